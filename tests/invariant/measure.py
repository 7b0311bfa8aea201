"""How far two runs are apart. Imports neither torch nor megatron: results of the pool are unpickled with it."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests import evidence


@dataclass(frozen=True)
class StepRow:
    """Figures of one step, as every rank reports them. `norms` holds `total` and each component that learns.

    `figures` are the stage's own, on which ranks must agree; between layouts they are not compared.
    """

    loss: float
    count: float
    num_images: int
    norms: dict[str, float]
    figures: dict[str, float] = field(default_factory=dict)


# What every member must hold, relative; measure to limit.
LIMITS: dict[str, float] = {
    "loss": 1e-5,
    "loss drift": 1e-6,
    "gradient norm": 1e-4,
    "gradient norm, step 0": 1e-6,
}
COMMAND = "make test-full" if os.environ.get("MEGAVLM_FULL_MATRIX") == "1" else "make test"
_UNITS: dict[str, str] = {
    "loss": "largest relative difference of a step",
    "loss drift": "mean signed relative difference",
    "gradient norm": "largest relative difference of a step, total and by component",
    "gradient norm, step 0": "relative difference",
}


def distances(rows: Sequence[StepRow], reference: Sequence[StepRow]) -> dict[str, float]:
    """Every measure of `LIMITS` between two runs, which saw the same tokens and images."""
    assert len(rows) == len(reference)
    for row, expected in zip(rows, reference, strict=True):
        # the count is a sum of weights, in another order
        assert math.isclose(row.count, expected.count, rel_tol=1e-6), "the runs saw different batches"
        assert row.num_images == expected.num_images, "the runs saw different batches"
        assert list(row.norms) == list(expected.norms), "the runs train different components"
    losses = [_relative(row.loss, expected.loss) for row, expected in zip(rows, reference, strict=True)]
    norms = [
        {name: abs(_relative(row.norms[name], expected.norms[name])) for name in row.norms}
        for row, expected in zip(rows, reference, strict=True)
    ]
    return {
        "loss": max(map(abs, losses)),
        "loss drift": abs(sum(losses) / len(losses)),
        "gradient norm": max(value for step in norms for value in step.values()),
        "gradient norm, step 0": norms[0]["total"],
    }


def record(
    name: str,
    measured: dict[str, float],
    against: str,
    limits: dict[str, float] = LIMITS,
    topic: str = "equivalence",
) -> None:
    """Write down what was measured of a member, also when it does not hold."""
    evidence.record(
        topic,
        [
            evidence.row(
                f"{name}: {measure}",
                value,
                unit=_UNITS.get(measure, "relative difference"),
                required=f"<= {limits[measure]:g}",
                reference=against,
                reference_value=0.0,
                command=COMMAND,
            )
            for measure, value in measured.items()
        ],
    )


def broken(measured: dict[str, float], limits: dict[str, float] = LIMITS) -> dict[str, Any]:
    """Measures over their limit (also NaN), with the limit; a test asserts that there are none."""
    return {name: (value, limits[name]) for name, value in measured.items() if not value <= limits[name]}


def _relative(value: float, expected: float) -> float:
    if expected == 0.0:  # of a component that does not learn yet
        return 0.0 if value == 0.0 else math.inf
    return (value - expected) / expected
