"""Packs and their bound, against a search through all packings."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.data.bin_packing import best_fit_decreasing, fewest_packs, martello_toth_l2

CAPACITY = 20


def best_of_all(sizes):
    """Fewest packs, by trying everything."""

    @functools.cache
    def fewest(left):
        if not left:
            return 0
        first, rest = left[0], left[1:]
        fillings = {(CAPACITY - first, rest)}
        best = len(left)
        while fillings:  # every way to fill the pack of the first sample
            room, others = fillings.pop()
            best = min(best, 1 + fewest(others))
            for index, size in enumerate(others):
                if size <= room:
                    fillings.add((room - size, others[:index] + others[index + 1 :]))
        return best

    return fewest(tuple(sorted(sizes, reverse=True)))


@given(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_the_bound_is_between_the_sum_and_the_best(sizes):
    bound = martello_toth_l2(sizes, CAPACITY)
    assert -(-sum(sizes) // CAPACITY) <= bound <= best_of_all(sizes)


@pytest.mark.parametrize(
    ("sizes", "bound"),
    [
        ([11] * 5, 5),  # no two together; their sum would fit into three
        ([20, 12, 12, 9, 9], 4),  # beside a 12 there is no room for a 9
        ([12, 12, 8, 8], 2),
        ([10] * 4, 2),
        ([1] * 41, 3),
        ([], 0),
    ],
)
def test_bounds_by_hand(sizes, bound):
    assert martello_toth_l2(sizes, CAPACITY) == bound


@given(st.lists(st.integers(1, CAPACITY), max_size=60))
def test_every_packing_holds_the_capacity(sizes):
    for pack in (fewest_packs, best_fit_decreasing):
        packs_N = pack(sizes, CAPACITY)
        used = np.bincount(packs_N, weights=sizes) if sizes else np.zeros(0)
        assert len(packs_N) == len(sizes) and (used > 0).all() and (used <= CAPACITY).all()
        assert len(used) >= martello_toth_l2(sizes, CAPACITY)


@given(st.lists(st.integers(1, CAPACITY), max_size=60))
def test_best_fit_takes_the_first_of_the_fullest_packs(sizes):
    expected, rooms = {}, []
    for sample in sorted(range(len(sizes)), key=lambda sample: (-sizes[sample], sample)):
        fitting = [(room, pack) for pack, room in enumerate(rooms) if room >= sizes[sample]]
        if not fitting:
            rooms.append(CAPACITY)
        pack = min(fitting)[1] if fitting else len(rooms) - 1
        rooms[pack] -= sizes[sample]
        expected[sample] = pack
    assert best_fit_decreasing(sizes, CAPACITY).tolist() == [expected[sample] for sample in range(len(sizes))]


def test_filling_up_beats_best_fit():
    # Best fit decreasing puts 9 beside 10 and needs a third pack.
    sizes = [10, 9, 7, 6, 4, 4]
    assert best_fit_decreasing(sizes, CAPACITY).max() + 1 == 3
    packs_N = fewest_packs(sizes, CAPACITY)
    assert packs_N.max() + 1 == 2
    assert np.bincount(packs_N, weights=sizes).tolist() == [20, 20]


def test_close_to_the_bound_on_many_samples():
    sizes = np.exp(np.random.default_rng(0).normal(7, 0.5, 2000)).astype(int).clip(1, 8192)
    assert fewest_packs(sizes, 8192).max() + 1 <= 1.005 * martello_toth_l2(sizes, 8192)


def test_a_sample_larger_than_a_pack():
    for function in (martello_toth_l2, fewest_packs, best_fit_decreasing):
        with pytest.raises(AssertionError):
            function([21], CAPACITY)
