"""Arithmetic of curves and axes: running means, thinning that loses no peak, and round numbers for ticks."""

import math
from collections.abc import Sequence

MAX_POINTS = 1000
"""Points of a curve that are drawn."""
_SMOOTHING_SHARE = 1 / 40
_LADDER = (1, 2, 5)

Point = tuple[float, float]
"""(step, value); the value may be NaN or infinite, which breaks a curve."""


def smooth(points: Sequence[Point]) -> list[Point]:
    """Running mean over about a fortieth of the points, looking both ways, so that a falling curve is not drawn late.

    The weights fall exponentially with the distance on either side. Values that are not finite are passed on and leave
    the means alone.
    """
    values = [value for _, value in points]
    decay = 1 - 2 / (max(3.0, len(values) * _SMOOTHING_SHARE) + 1)
    forward = _decaying_sums(values, decay)
    backward = _decaying_sums(values[::-1], decay)[::-1]
    smoothed = []
    for (step, value), (total, weight), (total_after, weight_after) in zip(points, forward, backward, strict=True):
        mean = (total + total_after) / (weight + weight_after) if math.isfinite(value) else value
        smoothed.append((step, mean))
    return smoothed


def _decaying_sums(values: Sequence[float], decay: float) -> list[tuple[float, float]]:
    """For each place, the sum of the finite values so far, older ones weighing less, and the sum of the weights."""
    total, weight = 0.0, 0.0
    sums = []
    for value in values:
        total, weight = decay * total, decay * weight
        if math.isfinite(value):
            total, weight = total + value, weight + 1
        sums.append((total, weight))
    return sums


def downsample(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points: both ends, and of every stretch between them the least and the greatest value.

    Where a stretch has values that are not finite, one of them is kept, so that the curve stays broken there.
    """
    if len(points) <= limit:
        return list(points)
    kept_per_stretch = 2 if all(math.isfinite(value) for _, value in points) else 3
    num_stretches = max(1, (limit - 2) // kept_per_stretch)
    inner = points[1:-1]
    kept = [points[0]]
    for index in range(num_stretches):
        kept += _extremes(inner[index * len(inner) // num_stretches : (index + 1) * len(inner) // num_stretches])
    return [*kept, points[-1]]


def _extremes(stretch: Sequence[Point]) -> list[Point]:
    finite = [index for index, (_, value) in enumerate(stretch) if math.isfinite(value)]
    broken = [index for index, (_, value) in enumerate(stretch) if not math.isfinite(value)]
    chosen = set(broken[:1])
    if finite:
        chosen |= {min(finite, key=lambda index: stretch[index][1]), max(finite, key=lambda index: stretch[index][1])}
    return [stretch[index] for index in sorted(chosen)]


def nice_step(span: float, num_ticks: int) -> float:
    """The 1, 2 or 5 times a power of ten that divides `span` into about `num_ticks` parts."""
    raw = span / num_ticks
    power = 10.0 ** math.floor(math.log10(raw))
    return next((factor * power for factor in _LADDER if raw <= factor * power * 1.0000001), 10 * power)


def step_ticks(first: float, last: float) -> list[float]:
    """Round whole steps between the ends of a step axis."""
    step = max(1.0, nice_step(last - first, 5))
    return [index * step for index in range(math.ceil(first / step), math.floor(last / step) + 1)]


def linear_ticks(low: float, high: float, num_ticks: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`; from 0 where that costs less than half the axis."""
    if 0 <= low <= 0.5 * high:
        low = 0.0
    if high == low:
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread if low else 0.0, high + spread
    step = nice_step(high - low, num_ticks)
    start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(start, stop + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers around `low` and `high` (positive): 1, 2, 5 times powers of ten, or powers alone over decades."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ladder = [factor * 10.0**exponent for exponent in exponents for factor in _LADDER]
    below = max(value for value in ladder if value <= low * 1.000001)
    above = min(value for value in ladder if value >= high / 1.000001)
    ticks = [value for value in ladder if below <= value <= above]
    if len(ticks) > 10:
        stride = math.ceil(len(exponents) / 8)
        stop = exponents[0] + stride * math.ceil((exponents[-1] - exponents[0]) / stride)
        return [10.0**exponent for exponent in range(exponents[0], stop + 1, stride)]
    if len(ticks) < 4:
        finer = [value for value in linear_ticks(low, high, 4) if value > 0]
        return finer if len(finer) > 2 else ticks
    return ticks


def format_tick(value: float, step: float) -> str:
    """A tick's label, exact where ticks are `step` apart: `0.25`, `2e-4`, `12k`, `1.5M`."""
    if value == 0:
        return "0"
    magnitude = abs(value)
    if magnitude < 1e-3 or (step < 1e-3 and magnitude < 1e-2) or magnitude >= 1e12:
        decimals = max(0, math.floor(math.log10(magnitude) + 1e-9) - math.floor(math.log10(step) + 1e-9))
        mantissa, exponent = f"{value:.{decimals}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.') if decimals else mantissa}e{int(exponent)}"
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if magnitude >= size and (magnitude >= 1e4 or step >= 1e3):
            return f"{value / size:,.{_num_decimals(step / size)}f}{unit}"
    return f"{value:,.{_num_decimals(step)}f}"


def _num_decimals(step: float) -> int:
    return max(0, -math.floor(math.log10(step) + 1e-9))
