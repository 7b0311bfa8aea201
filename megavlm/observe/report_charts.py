"""Which curves a report shows, and how the rows of the log become their points."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from megavlm.observe.charts import Chart, Marker, Series, build_chart
from megavlm.observe.curves import Point

Row = dict[str, Any]

COMPONENTS = ("language", "vision", "projector")
"""Components that have a colour of their own, in the order of the legend."""
HELD_OUT_SHARES = {
    "recall_at_1/image_to_text": ("Recall@1, image to text", "language"),
    "recall_at_1/text_to_image": ("Recall@1, text to image", "vision"),
    "rewards/accuracies": ("Reward accuracy", "language"),
    "accuracy": ("Accuracy", "language"),
    "exact_match": ("Exact match", "language"),
}
"""What evaluations measure as shares of 1: label, and the name of its colour."""
_LOSS_UNITS = {
    "sft": "mean cross-entropy per supervised token",
    "contrastive": "mean over images and their texts",
    "kto": "mean over answers",
    "prm": "mean over steps of answers",
}
_MAX_MARKERS = 20


def number(row: Row, name: str) -> float:
    """A field of a row as a float; NaN where it is missing or no number."""
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else math.nan


def build_charts(rows: Sequence[Row], stage: str = "sft") -> list[Chart]:
    """The figures of a report, those that have something to show.

    Args:
        rows: of the log.
        stage: training method, which says what the loss is a mean over.
    """
    train = [row for row in rows if row["kind"] == "train"]
    evaluated = [row for row in rows if row["kind"] == "eval" and "loss" in row]
    resumes = _resume_markers(rows)
    throughput = "Mean since the previous logged step, over all ranks."
    charts = [
        build_chart(
            "loss",
            "Loss",
            _LOSS_UNITS.get(stage, "mean over pairs of answers"),
            "Evaluation is on held-out rows." if evaluated else "",
            [
                Series("training", "language", _points(train, "loss"), smooth=True),
                Series("evaluation", "evaluation", _points(evaluated, "loss"), dots=len(evaluated) <= 60),
            ],
            scales=("linear", "log"),
            markers=[*_nonfinite_markers(train, "loss"), *resumes],
        ),
        build_chart(
            "held-out",
            "Held-out rows",
            "share",
            "What evaluations measured beside the loss.",
            [
                Series(label, style, _points(measured, name), dots=len(measured) <= 60)
                for name, (label, style) in HELD_OUT_SHARES.items()
                if (measured := [row for row in rows if row["kind"] == "eval" and name in row])
            ],
            from_zero=True,
        ),
        build_chart(
            "grad-norm",
            "Gradient norm",
            "L2 norm before clipping",
            "The total is over all components that learn.",
            [
                Series("total", "total", _points(train, "grad_norm"), smooth=True),
                *_component_series(train, "grad_norms", smooth=True),
            ],
            scales=("log", "linear"),
            markers=_nonfinite_markers(train, "grad_norm"),
        ),
        build_chart(
            "learning-rate",
            "Learning rate",
            "per component",
            "The rate that the step was taken with. Frozen components have none.",
            _merge_equal(_component_series(train, "learning_rates", smooth=False)),
            scales=("linear", "log"),
        ),
        build_chart(
            "tokens",
            "Token throughput",
            "tokens/s",
            throughput,
            [Series("tokens/s", "language", _points(train, "tokens_per_second"), smooth=True)],
            from_zero=True,
        ),
        build_chart(
            "images",
            "Image throughput",
            "images/s",
            throughput,
            [Series("images/s", "language", _points(train, "images_per_second"), smooth=True)],
            from_zero=True,
        ),
    ]
    return [chart for chart in charts if chart is not None]


def _points(rows: Sequence[Row], name: str) -> list[Point]:
    return [(row["step"], number(row, name)) for row in rows]


def _component_series(rows: Sequence[Row], name: str, smooth: bool) -> list[Series]:
    """One series per component of a field that maps components to numbers."""
    found = {component for row in rows for component in row.get(name) or {}}
    ordered = [component for component in COMPONENTS if component in found]
    ordered += sorted(found - set(COMPONENTS))
    return [
        Series(
            component,
            component if component in COMPONENTS else "other",
            [(row["step"], number(row.get(name) or {}, component)) for row in rows],
            smooth=smooth,
        )
        for component in ordered
    ]


def _merge_equal(series: Sequence[Series]) -> list[Series]:
    """One series for those with the same points, which would hide each other; it is labelled with all their names."""
    merged: dict[tuple[str, ...], Series] = {}
    for one in series:
        key = tuple(map(str, one.points))
        known = merged.get(key)
        merged[key] = one if known is None else dataclasses.replace(known, label=f"{known.label}, {one.label}")
    return list(merged.values())


def _nonfinite_markers(rows: Sequence[Row], name: str) -> list[Marker]:
    bad = [row for row in rows if name in row and not math.isfinite(number(row, name))]
    return [Marker(row["step"], "nonfinite", f"not finite at step {row['step']:,}") for row in bad[:_MAX_MARKERS]]


def _resume_markers(rows: Sequence[Row]) -> list[Marker]:
    steps = [row["step"] for row in rows if row["kind"] == "event" and row.get("event") == "resume"]
    return [Marker(step, "resume", f"resumed at step {step:,}") for step in steps[-_MAX_MARKERS:]]
