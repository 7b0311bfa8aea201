"""Better splits of the decoder layers over a layout's stages, by moving one layer at a time."""

from collections.abc import Iterator

from megavlm.pipeline.simulate import simulate
from megavlm.planner.plans import Candidate, Plan, play, with_counts
from megavlm.planner.stepcosts import Problem, schedule_of

NUM_PLAYED = 2
"""Moves of a round that are played in full: the best ones under the order of work that the split before had."""


def better_split(problem: Problem, candidate: Candidate, plan: Plan) -> Plan:
    """Move layers between stages, the best move first, until none makes the step shorter.

    Args:
        problem: what is planned for.
        candidate: a layout.
        plan: the candidate's, played; it fits the memory.

    Returns:
        The plan of the best split found, which fits the memory too; `plan` itself if no move is better.
    """
    limit = problem.hardware.usable_memory_bytes
    while True:
        costs = candidate.played.costs
        schedule = schedule_of(problem, candidate.layout, costs)
        screened: list[tuple[float, Candidate]] = []
        for counts in moves(plan.counts):
            moved = with_counts(problem, candidate, counts)
            if moved.bound_s < plan.step_s:
                step_s = simulate(schedule, moved.played.costs).makespan_s + moved.end.total_s
                screened.append((step_s, moved))
        screened.sort(key=lambda one: one[0])
        tried = [(play(problem, moved), moved) for _, moved in screened[:NUM_PLAYED]]
        better = [one for one in tried if one[0].step_s < plan.step_s and one[0].memory.total <= limit]
        if not better:
            return plan
        plan, candidate = min(better, key=lambda one: one[0].step_s)


def moves(counts: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All splits that differ by one layer's stage; only the first and the last stage may be empty."""
    last = len(counts) - 1
    for source, count in enumerate(counts):
        if count <= (0 if source in (0, last) else 1):
            continue
        for target in range(len(counts)):
            if target != source:
                moved = list(counts)
                moved[source] -= 1
                moved[target] += 1
                yield tuple(moved)
