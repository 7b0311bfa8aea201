"""From FLOPs to seconds on this machine: what a recorded step took, fitted to what it should have cost.

Each kind of work of each schedule position gets a line of its own, seconds = intercept + slope x FLOPs, by least
squares over the microbatches of the step. The slope holds how fast that rank is with work of that kind, the intercept
what every piece costs however small it is. Both are at least 0.

Shape suffixes: R schedule positions, C language-model chunks, M microbatches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megavlm.pipeline.actions import Compute, Kind, Receive, Schedule, Send
from megavlm.pipeline.costs import Link, StageCosts, stage_costs
from megavlm.pipeline.runtime import Event

WorkKey = tuple[Kind, int]
"""Kind of work, and its chunk."""


@dataclass(frozen=True)
class Line:
    """seconds = intercept_s + slope_s x FLOPs."""

    intercept_s: float
    slope_s: float

    def time_s(self, flops: float) -> float:
        """Seconds for so many FLOPs; work without FLOPs is not done at all."""
        return self.intercept_s + self.slope_s * flops if flops else 0.0


@dataclass(frozen=True)
class Calibration:
    """Lines by [position][kind and chunk], and what handing a message on costs the sender.

    Attributes:
        lines: per schedule position.
        send_s: mean time of a send, per position.
    """

    lines: tuple[Mapping[WorkKey, Line], ...]
    send_s: tuple[float, ...]


def fit_line(flops: Sequence[float], times_s: Sequence[float]) -> Line:
    """Least squares with both coefficients at least 0; only pieces that have FLOPs count."""
    pairs = [(x, y) for x, y in zip(flops, times_s, strict=True) if x > 0]
    if not pairs:
        return Line(0.0, 0.0)
    x, y = np.array(pairs).T
    proportional = Line(0.0, float((x * y).sum() / (x * x).sum()))
    if np.ptp(x) < 1e-3 * x.mean():
        return Line(0.0, float(y.mean() / x.mean()))
    slope, intercept = np.polyfit(x, y, 1)
    if slope < 0:
        return Line(float(y.mean()), 0.0)
    return Line(float(intercept), float(slope)) if intercept >= 0 else proportional


def fit_position(
    position: int, steps: Sequence[tuple[Sequence[Event], StageCosts]]
) -> tuple[dict[WorkKey, Line], float]:
    """Fit one position's events; returns its lines and its mean time of a send.

    Args:
        position: whose events.
        steps: of each recorded step the events and the exact costs.
    """
    samples: dict[WorkKey, list[tuple[float, float]]] = {}
    sends: list[float] = []
    for events, flops in steps:
        for event in events:
            seconds = event.end_s - event.start_s
            if isinstance(event.action, Compute):
                key = event.action.kind, event.action.chunk
                samples.setdefault(key, []).append((flops.time_s(position, event.action), seconds))
            elif isinstance(event.action, Send):
                sends.append(seconds)
    lines = {key: fit_line(*zip(*pairs, strict=True)) for key, pairs in samples.items()}
    return lines, float(np.mean(sends)) if sends else 0.0


def in_seconds(flops: StageCosts, calibration: Calibration, schedule: Schedule) -> StageCosts:
    """A step's costs in seconds.

    What a rank spends on sends is counted with the work that gives them: the simulator's sends take no time.

    Args:
        flops: the step's exact costs.
        calibration: of this machine, for these positions.
        schedule: says which work sends.
    """
    num_ranks, num_chunks, num_microbatches = flops.shape
    language = {kind: np.zeros((num_ranks, num_chunks, num_microbatches)) for kind in ("F", "B")}
    encoder = {kind: np.zeros((num_ranks, num_microbatches)) for kind in ("EF", "EB")}
    for position in range(num_ranks):
        before: Compute | None = None
        for action in schedule.actions[position]:
            if isinstance(action, Receive):
                continue
            if isinstance(action, Compute):
                before = action
                line = calibration.lines[position].get((action.kind, action.chunk), Line(0.0, 0.0))
                seconds = line.time_s(flops.time_s(position, action))
            else:
                seconds = calibration.send_s[position]
            assert before is not None
            if before.kind in language:
                language[before.kind][position, before.chunk, before.microbatch] += seconds
            elif before.kind == "EB":
                encoder["EB"][position, before.microbatch] += seconds
            else:
                # `E` and `EF` of a microbatch share their entry: encoded twice, the dearer one counts for both.
                entry = encoder["EF"][position, before.microbatch]
                encoder["EF"][position, before.microbatch] = (
                    max(entry, seconds) if isinstance(action, Compute) else entry + seconds
                )
    return stage_costs(
        num_ranks,
        num_chunks,
        num_microbatches,
        forward_s=language["F"],
        backward_s=language["B"],
        encode_forward_s=encoder["EF"],
        encode_backward_s=encoder["EB"],
        link=Link(),
    )
