"""Images of unequal cost over ranks."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megavlm.data.spread import imbalance, longest_first, spread


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60), st.integers(1, 9))
def test_never_worse_than_longest_first(costs, num_ranks):
    ranks = spread(costs, num_ranks)
    largest = np.bincount(ranks, weights=costs, minlength=num_ranks).max()
    first = longest_first(np.array(costs), num_ranks)
    greedy = np.bincount(first, weights=costs, minlength=num_ranks).max()
    lower = max(sum(costs) / num_ranks, max(costs))
    assert len(ranks) == len(costs) and set(ranks.tolist()) <= set(range(num_ranks))
    assert lower - 1e-6 <= largest <= greedy + 1e-6
    assert greedy <= (4 / 3) * lower + max(costs) / 3 + 1e-6


def test_items_change_places_where_longest_first_misses_the_best():
    # Graham's example: longest first ends with 7 against 6.
    costs = [3, 3, 2, 2, 2]
    assert imbalance(costs, longest_first(np.array(costs), 2), 2) == 7 / 6
    assert imbalance(costs, spread(costs, 2), 2) == 1.0


def test_what_an_image_that_is_too_large_leaves_is_even():
    costs = np.array([1000.0, *[10.0] * 8, *[5.0] * 8])
    loads = np.bincount(spread(costs, 5), weights=costs, minlength=5)
    assert sorted(loads.tolist()) == [30, 30, 30, 30, 1000]


def test_exact_costs_balance_32_ranks():
    generator = np.random.default_rng(0)
    patches = np.exp(generator.normal(7.0, 0.7, 512)).astype(int) + 64
    cost = patches * (2 * 1152**2 * 12) + 4 * patches.astype(float) ** 2 * 1152
    exact = imbalance(cost, spread(cost, 32), 32)
    by_count = imbalance(cost, np.arange(512) % 32, 32)
    assert exact <= 1.002 < by_count


def test_every_rank_computes_the_same():
    costs = [3, 3, 3, 1, 1, 1]
    assert spread(costs, 2).tolist() == spread(list(costs), 2).tolist() == [0, 1, 0, 1, 1, 1]


def test_nothing_costs_anything():
    assert len(spread([0, 0, 0], 2)) == 3
    assert len(spread([], 2)) == 0
