"""Turns of sources: shares of every beginning, and any place without the walk to it."""

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.data import interleave
from megavlm.data.interleave import Interleave, NestedInterleave, draws_until, whole_weights

weights = st.lists(st.integers(1, 12) | st.integers(1, 400), min_size=1, max_size=8)


def counts_of_walk(sources_D, num_sources):
    """int64 [D + 1, S]: how often each source stands before a place."""
    steps = np.eye(num_sources, dtype=np.int64)[sources_D]
    return np.concatenate((np.zeros((1, num_sources), dtype=np.int64), np.cumsum(steps, axis=0)))


def distance(counts, whole):
    """Largest distance from the share, in draws, over all beginnings and sources, in units of 1 / sum of weights."""
    places = np.arange(len(counts))[:, None]
    return np.abs(counts * sum(whole) - places * np.array(whole)).max()


@given(weights, st.sampled_from([1, 50, 1024]))
@settings(max_examples=120, deadline=None)
def test_every_beginning_keeps_the_shares_within_one_draw(weights, shortest_window):
    # The shorter the windows, the more borders there are at which the order is begun anew.
    whole = whole_weights(weights)
    with patch.object(interleave, "_SHORTEST_WINDOW", shortest_window):
        sources_D, ordinals_D = Interleave(whole).draws(0, min(2 * sum(whole) + 7, 4000))
    counts = counts_of_walk(sources_D, len(whole))
    assert distance(counts, whole) < sum(whole)
    assert ordinals_D.tolist() == [counts[place, source] for place, source in enumerate(sources_D)]


@given(weights, st.lists(st.integers(0, 3000), min_size=2, max_size=2))
@settings(max_examples=60, deadline=None)
def test_any_place_is_found_without_the_walk_to_it(weights, borders):
    whole, (first, last) = whole_weights(weights), sorted(borders)
    with patch.object(interleave, "_SHORTEST_WINDOW", 64):
        walked = Interleave(whole).draws(0, last)
        found = Interleave(whole).draws(first, last)
        for walk, part in zip(walked, found, strict=True):
            assert part.tolist() == walk[first:].tolist()
        assert Interleave(whole).counts(last).tolist() == np.bincount(walked[0], minlength=len(whole)).tolist()


def test_far_away_shares_are_still_kept():
    whole = whole_weights([3**0.5, 2**0.5, 0.1, 1e-3])
    counts = Interleave(whole).counts(10**12)
    exact = [10**12 * weight / sum(whole) for weight in whole]
    assert np.abs(counts - exact).max() <= 1


@pytest.mark.parametrize(
    ("given", "whole"),
    [([0.5, 0.3, 0.2], (5, 3, 2)), ([2, 4, 6], (1, 2, 3)), ([0.1, 0.25], (2, 5)), ([7.5], (1,))],
)
def test_decimals_are_exact(given, whole):
    assert whole_weights(given) == whole


def test_other_numbers_are_rounded_to_a_billionth_of_the_whole():
    given = [2**0.5, 3**0.5, 1e-6]
    whole = whole_weights(given)
    for weight, number in zip(given, whole, strict=True):
        assert abs(number / sum(whole) - weight / sum(given)) < 1e-9


def test_an_order_by_hand():
    assert Interleave((2, 1)).draws(0, 6)[0].tolist() == [0, 0, 1, 0, 0, 1]


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=4), st.integers(0, 900))
@settings(max_examples=60, deadline=None)
def test_groups_share_first(groups, first):
    flat = [weight for group in groups for weight in group]
    numbers = np.split(np.arange(len(flat)), np.cumsum([len(group) for group in groups])[:-1])
    group_weights = [1 + number for number in range(len(groups))]
    turns = NestedInterleave(group_weights, [part.tolist() for part in numbers], flat)
    sources_D, ordinals_D = turns.draws(0, 1000)
    counts = counts_of_walk(sources_D, len(flat))
    of_groups = np.stack([counts[:, part].sum(axis=1) for part in numbers], axis=1)
    assert distance(of_groups, group_weights) < sum(group_weights)
    for part, group, weight in zip(numbers, groups, group_weights, strict=True):
        shares = np.array(group) / sum(group) * weight / sum(group_weights)
        assert np.abs(counts[:, part] - np.arange(1001)[:, None] * shares).max() < 2
    assert [part.tolist() for part in turns.draws(first, 1000)] == [
        sources_D[first:].tolist(),
        ordinals_D[first:].tolist(),
    ]
    assert turns.counts(first).tolist() == counts[first].tolist()


@given(weights, st.integers(1, 500), st.data())
@settings(max_examples=40, deadline=None)
def test_when_a_source_has_had_so_many(weights, count, data):
    turns = Interleave(whole_weights(weights))
    source = data.draw(st.integers(0, len(weights) - 1))
    end = draws_until(turns, source, count)
    assert turns.counts(end)[source] == count and turns.counts(end - 1)[source] == count - 1
