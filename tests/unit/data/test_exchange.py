"""The local search behind balanced packs and spread images."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megavlm.data.exchange import even_out, in_even_loads


@st.composite
def problems(draw):
    """(costs [2, N], bins, number of bins, sizes)."""
    num_items, num_bins = draw(st.integers(1, 24)), draw(st.integers(1, 5))
    whole = st.integers(0, 30)
    costs = [draw(st.lists(whole, min_size=num_items, max_size=num_items)) for _ in range(2)]
    bins = draw(st.lists(st.integers(0, num_bins - 1), min_size=num_items, max_size=num_items))
    sizes = draw(st.lists(st.integers(1, 9), min_size=num_items, max_size=num_items))
    return np.array(costs, dtype=np.float64), np.array(bins), num_bins, np.array(sizes)


def fullest(costs_VN, bins_N, num_bins):
    shares = [in_even_loads(costs_N, num_bins) for costs_N in costs_VN if costs_N.any()]
    return max((np.bincount(bins_N, weights=row, minlength=num_bins).max() for row in shares), default=0.0)


@given(problems(), st.booleans())
def test_never_worse_and_within_the_capacity(problem, keep_counts):
    costs_VN, bins_N, num_bins, sizes_N = problem
    capacity = int(np.bincount(bins_N, weights=sizes_N).max()) + 2
    before = bins_N.copy()
    after = even_out(costs_VN, bins_N, num_bins, sizes_N=sizes_N, capacity=capacity, keep_counts=keep_counts)
    assert (bins_N == before).all()
    assert fullest(costs_VN, after, num_bins) <= fullest(costs_VN, before, num_bins) + 1e-9
    assert np.bincount(after, weights=sizes_N).max() <= capacity
    counts_before, counts_after = (np.bincount(bins, minlength=num_bins) for bins in (before, after))
    assert ((counts_after > 0) >= (counts_before > 0)).all()
    if keep_counts:
        assert (counts_after == counts_before).all()


def test_an_item_moves():
    assert even_out(np.array([[2.0, 2, 2, 2]]), np.array([0, 0, 0, 1]), 2).tolist().count(0) == 2


def test_items_change_places():
    # The numbers of items are right, only 5 + 4 stand on one side; no move alone helps.
    after = even_out(np.array([[5.0, 4, 2, 1]]), np.array([0, 0, 1, 1]), 2, keep_counts=True)
    assert after[0] != after[1] and after[2] != after[3]


def test_two_for_two():
    # 45 against 43: no item, and no item for another, is 1 more; 5 + 10 for 7 + 7 is.
    costs = np.array([[5.0, 10, 30, 7, 7, 14, 15]])
    after = even_out(costs, np.array([0, 0, 0, 1, 1, 1, 1]), 2)
    assert np.bincount(after, weights=costs[0]).tolist() == [44, 44]


def test_both_resources_count():
    # Even in the first; the second is all in one bin.
    costs = np.array([[1.0, 1, 1, 1], [1.0, 1, 0, 0]])
    after = even_out(costs, np.array([0, 0, 1, 1]), 2)
    assert np.bincount(after, weights=costs[0]).tolist() == [2, 2]
    assert np.bincount(after, weights=costs[1]).tolist() == [1, 1]


def test_the_capacity_forbids_it():
    costs, bins = np.array([[1.0, 1, 1, 1]]), np.array([0, 0, 0, 1])
    sizes = np.array([3, 3, 3, 8])
    assert even_out(costs, bins, 2, sizes_N=sizes, capacity=10).tolist() == bins.tolist()
    assert even_out(costs, bins, 2, sizes_N=sizes, capacity=11).tolist().count(0) == 2


def test_even_loads_leave_the_largest_out():
    # 100 is alone; what is left, 6, is 2 for each of three bins.
    assert in_even_loads(np.array([100.0, 1, 1, 2, 2]), 4).tolist() == [1, 0.5, 0.5, 1, 1]
    assert in_even_loads(np.array([4.0, 2, 2]), 2).tolist() == [1, 0.5, 0.5]
    assert in_even_loads(np.array([3.0, 1]), 4).tolist() == [1, 1]
    assert in_even_loads(np.array([3.0, 0, 0]), 2).tolist() == [1, 0, 0]


def test_nothing_to_even_out():
    bins = np.array([0, 0, 1])
    assert even_out(np.zeros((2, 3)), bins, 2).tolist() == bins.tolist()
