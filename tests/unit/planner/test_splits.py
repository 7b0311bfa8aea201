"""Better splits of the decoder layers: the moves reach every split, and climbing finds the best of all splits."""

import dataclasses
from collections import Counter

import pytest

from benchmarks.planner import splits
from megavlm.planner.layouts import layouts, space_of
from megavlm.planner.plans import bounded, describe, play, with_counts
from megavlm.planner.splits import better_split, moves
from tests.unit.planner.builders import ARCHITECTURE, make_problem

MOST_BEHIND = 0.01
"""Climbing stops where no single layer's move helps: it may end that far from the best of all splits."""


def test_moves_reach_every_split_and_no_other() -> None:
    every = set(splits(6, 4))
    assert len(every) == 35 and (0, 1, 5, 0) in every
    reached, fresh = {(2, 2, 1, 1)}, [(2, 2, 1, 1)]
    while fresh:
        fresh = [counts for one in fresh for counts in moves(one) if counts not in reached]
        reached.update(fresh)
    assert reached == every


@pytest.mark.parametrize("placement", ["first_stage", "stage", "spread", "bubble", "own_ranks"])
def test_as_good_as_every_split(placement: str) -> None:
    problem = make_problem(num_gpus=5 if placement == "own_ranks" else 4)
    space = dataclasses.replace(space_of(problem.recipe, problem.num_gpus, 1), placements=(placement,))
    deep = [
        one
        for one in bounded(problem, layouts(space, ARCHITECTURE, problem.recipe, Counter()))
        if len(one.played.counts) in (3, 4) and one.layout.placement == placement and one.layout.recompute == "none"
    ]
    assert deep
    for candidate in deep:
        skewed = with_counts(
            problem,
            candidate,
            (ARCHITECTURE.language.num_layers - len(candidate.played.counts) + 1,)
            + (1,) * (len(candidate.played.counts) - 1),
        )
        plan = play(problem, skewed)
        found = better_split(problem, skewed, plan)
        every = [
            play(problem, with_counts(problem, candidate, counts)).step_s
            for counts in splits(ARCHITECTURE.language.num_layers, len(candidate.played.counts))
        ]
        assert found.step_s < plan.step_s, describe(candidate.layout)
        assert found.step_s <= min(every) * (1 + MOST_BEHIND), describe(candidate.layout)
