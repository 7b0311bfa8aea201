"""Figures of a timeline: who worked and who waited, for what, and how uneven the work is. Pure functions.

Shape suffixes: R pipeline ranks, M microbatches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megavlm.observe.timeline import ENCODER_KINDS, KINDS, LANGUAGE_KINDS, REDUCE_KIND, Band, Timeline, TimelineEvent

WORK_KINDS = (*ENCODER_KINDS, *LANGUAGE_KINDS)
BUSY_KINDS = tuple(kind for kind in KINDS if kind != "receive")

CAUSES = ("activation", "gradient", "features", "encode", "drained", "between")
"""Why a rank is idle. As the simulator has it: the language model waits for an activation, a gradient or the encoder's
features; the encoder waits for its input or its gradient (`encode`); the rank has done its part of the schedule
(`drained`). And, in a measured step only, `between`: the time between two actions."""

CAUSE_OF_PAYLOAD = {
    "activation": "activation",
    "gradient": "gradient",
    "features": "features",
    "feature_gradient": "encode",
    "vision_activation": "encode",
    "vision_gradient": "encode",
}


@dataclass(frozen=True)
class BandFigures:
    """What a band adds up to.

    Attributes:
        makespan_s: until the last rank has finished.
        schedule_s: until the last rank has done its part of the schedule: without the reductions behind it, which are
            not simulated.
        busy_R: per rank the seconds of each of `BUSY_KINDS`.
        idle_R: per rank the seconds of each of `CAUSES`; with `busy_R` they add up to the makespan.
        busy_share: of each of `BUSY_KINDS`, over makespan times ranks.
        idle_share: of each of `CAUSES`, over makespan times ranks.
    """

    makespan_s: float
    schedule_s: float
    busy_R: tuple[dict[str, float], ...]
    idle_R: tuple[dict[str, float], ...]
    busy_share: dict[str, float]
    idle_share: dict[str, float]

    @property
    def bubble_share(self) -> float:
        """Idle time of all ranks over makespan times ranks."""
        return sum(self.idle_share.values())

    @property
    def idle_over_work(self) -> float:
        """Idle time of all ranks over their work: (p-1)/m for 1F1B with equal stages. Infinite without work."""
        work = sum(self.busy_share[kind] for kind in WORK_KINDS)
        return self.bubble_share / work if work else math.inf


def summarize(band: Band) -> BandFigures:
    """Add up a band."""
    busy_R, idle_R = busy_by_kind(band), idle_by_cause(band)
    total_s = band.makespan_s * len(band.ranks)
    ends_s = [event.end_s for row in band.ranks for event in row if event.kind != REDUCE_KIND]
    return BandFigures(
        makespan_s=band.makespan_s,
        schedule_s=max(ends_s, default=0.0),
        busy_R=busy_R,
        idle_R=idle_R,
        busy_share={kind: sum(busy[kind] for busy in busy_R) / total_s for kind in BUSY_KINDS},
        idle_share={cause: sum(idle[cause] for idle in idle_R) / total_s for cause in CAUSES},
    )


def busy_by_kind(band: Band) -> tuple[dict[str, float], ...]:
    """Per rank the seconds of each of `BUSY_KINDS`."""
    rows = []
    for row in band.ranks:
        busy = dict.fromkeys(BUSY_KINDS, 0.0)
        for event in row:
            if event.kind in busy:
                busy[event.kind] += event.end_s - event.start_s
        rows.append(busy)
    return tuple(rows)


def idle_by_cause(band: Band) -> tuple[dict[str, float], ...]:
    """Per rank the seconds of each of `CAUSES`; what no event covers counts as `between`, and as `drained` behind the
    rank's part of the schedule.
    """
    return tuple(_idle(row, band.makespan_s) for row in band.ranks)


def _idle(row: Sequence[TimelineEvent], makespan_s: float) -> dict[str, float]:
    idle = dict.fromkeys(CAUSES, 0.0)
    now_s = 0.0
    for event in row:
        # Ranks that are done early wait there for the others before they reduce.
        idle["drained" if event.kind == REDUCE_KIND else "between"] += max(0.0, event.start_s - now_s)
        if event.kind == "receive":
            assert event.payload is not None
            idle[CAUSE_OF_PAYLOAD[event.payload]] += event.end_s - event.start_s
        now_s = event.end_s
    idle["drained"] += max(0.0, makespan_s - now_s)
    return idle


def measured_over_simulated(timeline: Timeline) -> float | None:
    """Relative difference of the measured schedule from the simulated one, 0.05 for 5 % longer; reductions left out.

    None where there is no simulation, or nothing in it takes time.
    """
    if timeline.simulated is None:
        return None
    simulated_s = summarize(timeline.simulated).schedule_s
    return summarize(timeline.measured).schedule_s / simulated_s - 1 if simulated_s else None


@dataclass(frozen=True)
class Imbalance:
    """Maximum over mean of the costs of one part of the model; 1 is even, None where there is no work.

    Attributes:
        ranks: of the ranks' totals over the step.
        microbatches: of the microbatches' totals over the ranks.
        over_ranks_M: within each microbatch, over the ranks.
        over_microbatches_R: within each rank, over the microbatches.
    """

    ranks: float | None
    microbatches: float | None
    over_ranks_M: tuple[float | None, ...]
    over_microbatches_R: tuple[float | None, ...]


def measure_imbalance(costs_RM: Sequence[Sequence[float]]) -> Imbalance:
    """How uneven a cost table is, both ways."""
    costs_MR = tuple(zip(*costs_RM, strict=True))
    return Imbalance(
        ranks=max_over_mean([sum(row) for row in costs_RM]),
        microbatches=max_over_mean([sum(column) for column in costs_MR]),
        over_ranks_M=tuple(max_over_mean(column) for column in costs_MR),
        over_microbatches_R=tuple(max_over_mean(row) for row in costs_RM),
    )


def max_over_mean(values: Sequence[float]) -> float | None:
    """The largest over the mean; None where the sum is 0."""
    total = sum(values)
    return max(values) * len(values) / total if total > 0 else None


def add_costs(first_RM: Sequence[Sequence[float]], second_RM: Sequence[Sequence[float]]) -> list[list[float]]:
    """Two cost tables of one unit, added."""
    return [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(first_RM, second_RM, strict=True)]
