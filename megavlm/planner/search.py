"""The search for the quickest layouts that fit, under the stated cost model.

Branch and bound: every layout has a lower bound of its step time that costs little; layouts are played in the order of
their bounds, until no bound is below what is already found. So the result is that of playing all of them, each with the
even split of its layers. The quickest of them then try other splits (`splits.py`).
"""

import bisect
import functools
import heapq
from collections import Counter
from dataclasses import dataclass

from megavlm.errors import UseError, use_error
from megavlm.pipeline.actions import Schedule
from megavlm.pipeline.schedules import interleaved
from megavlm.planner.layouts import Space, layouts
from megavlm.planner.memory import Load, RankMemory
from megavlm.planner.plans import Candidate, Plan, bounded, describe, play, recipe_of
from megavlm.planner.splits import better_split
from megavlm.planner.stepcosts import Problem

SPLIT_GAIN = 0.02
"""How much shorter a step another split may make; layouts further behind the best ones do not try any."""
NUM_LEAST = 20
"""Layouts that are played where none fits, to say how much memory would do."""
GB = 1e9


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
        plans: the quickest that fit, the best first.
        why_not: layouts that are none, by reason.
        num_layouts: that divide.
        num_played: that were simulated.
        num_too_large: that were looked at and need more memory than there is.
        bounds_s: by placement, the least lower bound of a step time.
    """

    plans: tuple[Plan, ...]
    why_not: Counter[str]
    num_layouts: int
    num_played: int
    num_too_large: int
    bounds_s: dict[str, float]


def search(problem: Problem, space: Space, num_best: int = 5) -> Found:
    """The quickest layouts.

    Args:
        problem: what is planned for.
        space: what may be chosen.
        num_best: how many to return at most.

    Raises:
        UseError: no layout divides, or none fits the memory.
    """
    why_not: Counter[str] = Counter()
    candidates = bounded(problem, layouts(space, problem.workload.architecture, problem.recipe, why_not))
    if not candidates:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in why_not.most_common(3))
        raise use_error("--gpus", problem.num_gpus, "a number that some layout uses", f"change it: {reasons}")
    candidates.sort(key=lambda one: one.bound_s)
    limit = problem.hardware.usable_memory_bytes
    fitting: list[tuple[Plan, Candidate]] = []
    too_large: list[tuple[float, Candidate]] = []
    num_played = 0
    for candidate in candidates:
        if len(fitting) >= num_best and candidate.bound_s >= fitting[num_best - 1][0].step_s:
            break
        needed = _least_memory(problem, candidate, limit)
        if needed <= limit:
            num_played += 1
            plan = play(problem, candidate)
            needed = plan.memory.total
            if needed <= limit:
                bisect.insort(fitting, (plan, candidate), key=lambda one: one[0].step_s)
                continue
        too_large.append((needed, candidate))
    if not fitting:
        raise _no_memory(problem, too_large)
    bounds_s: dict[str, float] = {}
    for candidate in candidates:
        bounds_s.setdefault(candidate.layout.placement, candidate.bound_s)
    best = _with_better_splits(problem, fitting, num_best)
    return Found(best, why_not, len(candidates), num_played, len(too_large), bounds_s)


def _with_better_splits(problem: Problem, fitting: list[tuple[Plan, Candidate]], num_best: int) -> tuple[Plan, ...]:
    """The best of some layouts, sorted by step time, after these have tried other splits of their layers."""
    best: list[Plan] = []
    for plan, candidate in fitting:
        if len(best) >= num_best and plan.step_s > best[num_best - 1].step_s * (1 + SPLIT_GAIN):
            break
        bisect.insort(best, better_split(problem, candidate, plan), key=lambda one: one.step_s)
    return tuple(best[:num_best])


def _no_memory(problem: Problem, too_large: list[tuple[float, Candidate]]) -> UseError:
    """What the layouts that seem to need least do need."""
    hardware = problem.hardware
    least = heapq.nsmallest(NUM_LEAST, too_large, key=lambda one: one[0])
    plan = min((play(problem, candidate) for _, candidate in least), key=lambda one: one.memory.total)
    return use_error(
        "--memory-gb",
        f"{hardware.memory_bytes / GB:.3g} ({hardware.usable_memory:.0%} of it usable)",
        f"at least {plan.memory.total / hardware.usable_memory / GB:.3g}, for {describe(plan.layout)}",
        "use more or larger GPUs, or shorter sequences",
    )


def _least_memory(problem: Problem, candidate: Candidate, limit: float) -> float:
    """What a layout needs at least: cheap, so that many need not be played.

    Weights, gradients and optimizer of the position that has most; and, where that is below the limit and placing the
    encoder would cost time, the first stage with the activations of the language model alone.
    """
    layout, topology = candidate.layout, candidate.layout.topology
    recipe = recipe_of(problem.recipe, layout, candidate.played.counts)
    positions = {0, topology.first_position, topology.num_positions - 1}
    ranks = [RankMemory(problem.workload.architecture, recipe, topology, position) for position in sorted(positions)]
    states = [rank.state for rank in ranks]
    least = max(float(state.weights + state.gradients + state.optimizer) for state in states)
    if least > limit or layout.placement != "bubble":
        return least
    packs = candidate.pieces.batch.fullest
    alone = _language_alone(layout.pipeline, layout.chunks, len(packs))
    loads = [Load(pack.lengths, (), pack.num_visual_tokens) for pack in packs]
    memory = ranks[0].peak(alone, loads)
    return max(least, memory.state + memory.activations)


@functools.lru_cache(maxsize=256)
def _language_alone(num_ranks: int, num_chunks: int, num_microbatches: int) -> Schedule:
    return interleaved(num_ranks, num_chunks, num_microbatches)
