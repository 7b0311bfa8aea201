"""Charts as data: every curve an SVG path, every tick a percentage, and what the pointer reads.

Nothing here knows HTML; `report.html.j2` draws what these records say. A plot is 1000 x 1000 units with y downwards and
is stretched to the size it gets on the page. Labels are placed by percentages, so text is never stretched.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megavlm.observe.curves import Point, downsample, format_tick, linear_ticks, log_ticks, smooth, step_ticks

MIN_POINTS_OF_LINE = 12
"""Curves with fewer points are drawn with a dot at each, and are not smoothed."""


@dataclass(frozen=True)
class Series:
    """One quantity over steps, in step order, values that are not finite included.

    Attributes:
        label: as the legend says it.
        style: the name of its colour and dashes in the style sheet.
        points: (step, value).
        smooth: draw a running mean, with the values in the background.
        dots: mark every point (for few points).
    """

    label: str
    style: str
    points: Sequence[Point]
    smooth: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Marker:
    """Something that happened at a step, drawn as a vertical line; `kind` is `resume` or `nonfinite`."""

    step: float
    kind: str
    text: str
    percent: float = 0.0


@dataclass(frozen=True)
class Tick:
    """A gridline and its label, at `percent` of the axis from its origin."""

    percent: float
    label: str


@dataclass(frozen=True)
class Curve:
    """One line: thinned points, and how it is drawn: `weight` is `raw` (in the background), `line` or `dots`."""

    label: str
    style: str
    weight: str
    points: tuple[Point, ...]

    @property
    def finite(self) -> list[Point]:
        """The points that have a place."""
        return [point for point in self.points if math.isfinite(point[1])]


@dataclass(frozen=True)
class View:
    """A chart under one scale of its y axis; `low` and `high` are the ends of that axis, `paths` go with the curves."""

    scale: str
    low: float
    high: float
    y_ticks: tuple[Tick, ...]
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Chart:
    """One figure: `first` and `last` are the ends of the step axis; the first view is the one to show."""

    name: str
    title: str
    unit: str
    caption: str
    first: float
    last: float
    x_ticks: tuple[Tick, ...]
    views: tuple[View, ...]
    curves: tuple[Curve, ...]
    markers: tuple[Marker, ...]

    @property
    def has_means(self) -> bool:
        """Whether curves are drawn twice, each step and running mean."""
        return any(curve.weight == "raw" for curve in self.curves)

    @property
    def readout(self) -> dict:
        """What the script of the page needs to read values under the pointer."""
        return {
            "first": self.first,
            "last": self.last,
            "views": {view.scale: [view.low, view.high] for view in self.views},
            "curves": [
                {
                    "label": curve.label,
                    "style": curve.style,
                    "raw": curve.weight == "raw",
                    "x": [step for step, _ in curve.finite],
                    "y": [float(f"{value:.5g}") for _, value in curve.finite],
                }
                for curve in self.curves
            ],
        }


def build_chart(
    name: str,
    title: str,
    unit: str,
    caption: str,
    series: Sequence[Series],
    scales: Sequence[str] = ("linear",),
    markers: Sequence[Marker] = (),
    from_zero: bool = False,
) -> Chart | None:
    """Lay out a chart; None where no series has a finite value.

    Args:
        name: identifier on the page.
        title: what is drawn.
        unit: of the y axis.
        caption: how to read it, in a sentence.
        series: the quantities, in the order of the legend.
        scales: `linear`, `log`, or both, the one to show first in front; `log` is left out where nothing is positive.
        markers: vertical lines; those outside the axis are left out.
        from_zero: the linear axis holds 0, as it should where a ratio is read off.
    """
    curves = [curve for one in series for curve in _curves(one)]
    steps = [step for curve in curves for step, _ in curve.finite]
    if not steps:
        return None
    first, last = _step_range(min(steps), max(steps))
    axis = _Axis("linear", first, last)
    ticks = step_ticks(first, last)
    tick_gap = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    return Chart(
        name=name,
        title=title,
        unit=unit,
        caption=caption,
        first=first,
        last=last,
        x_ticks=tuple(Tick(100 * axis.place(step), format_tick(step, tick_gap)) for step in ticks),
        views=tuple(view for scale in scales if (view := _view(curves, scale, axis, from_zero)) is not None),
        curves=tuple(curves),
        markers=tuple(
            Marker(one.step, one.kind, one.text, 100 * axis.place(one.step))
            for one in markers
            if first <= one.step <= last
        ),
    )


@dataclass(frozen=True)
class _Axis:
    scale: str
    low: float
    high: float

    def has(self, value: float) -> bool:
        return math.isfinite(value) and (self.scale == "linear" or value > 0)

    def place(self, value: float) -> float:
        """Where `value` lies, 0 at the low end and 1 at the high end."""
        if self.scale == "log":
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def _curves(series: Series) -> list[Curve]:
    num_finite = sum(math.isfinite(value) for _, value in series.points)
    if num_finite == 0:
        return []
    thin = tuple(downsample(series.points))
    if num_finite < MIN_POINTS_OF_LINE or series.dots:
        return [Curve(series.label, series.style, "dots", thin)]
    if not series.smooth:
        return [Curve(series.label, series.style, "line", thin)]
    mean = tuple(downsample(smooth(series.points)))
    return [Curve(series.label, series.style, "raw", thin), Curve(series.label, series.style, "line", mean)]


def _step_range(first: float, last: float) -> tuple[float, float]:
    """The ends of the step axis: from 0 where training began there, and never without an extent."""
    if first == last:
        return first - 1, first + 1
    return (0.0 if first <= 0.1 * last else first), last


def _view(curves: Sequence[Curve], scale: str, steps: _Axis, from_zero: bool) -> View | None:
    values = [value for curve in curves for _, value in curve.finite if scale == "linear" or value > 0]
    if not values:
        return None
    low, high = min(values), max(values)
    if from_zero and scale == "linear":
        low, high = min(0.0, low), max(0.0, high)
    ticks = log_ticks(low, high) if scale == "log" else linear_ticks(low, high)
    axis = _Axis(scale, min(ticks[0], low), max(ticks[-1], high))
    is_even = scale == "linear" or math.isclose(ticks[1] - ticks[0], ticks[-1] - ticks[-2])
    labels = [format_tick(tick, ticks[1] - ticks[0] if is_even else tick) for tick in ticks]
    return View(
        scale=scale,
        low=axis.low,
        high=axis.high,
        y_ticks=tuple(Tick(100 * axis.place(tick), label) for tick, label in zip(ticks, labels, strict=True)),
        paths=tuple(_path(curve, steps, axis) for curve in curves),
    )


def _path(curve: Curve, steps: _Axis, axis: _Axis) -> str:
    """Lines between neighbours, broken where a value has no place; a point alone becomes a line without a length."""
    words: list[str] = []
    run_length = 0
    for step, value in curve.points:
        if not axis.has(value):
            words += ["h0"] if run_length == 1 else []
            run_length = 0
            continue
        run_length += 1
        words.append(f"{'M' if run_length == 1 else 'L'}{_round(steps.place(step))} {_round(1 - axis.place(value))}")
    return "".join([*words, "h0"] if run_length == 1 else words)


def _round(share: float) -> str:
    return f"{1000 * share:.1f}".removesuffix(".0")
