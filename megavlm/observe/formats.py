"""Numbers as people read them: one way for the progress line, the log line and the report."""

import math

_COUNT_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def format_number(value: float, digits: int = 4) -> str:
    """A quantity without a unit, to `digits` significant digits: `0.4127`, `12,346`, `3.00e-05`, `NaN`."""
    if not math.isfinite(value):
        return _format_nonfinite(value)
    if value == 0:
        return "0"
    magnitude = abs(value)
    if magnitude < 1e-3 or magnitude >= 1e9:
        return f"{value:.2e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(magnitude)))
    return f"{value:,.{decimals}f}"


def format_count(value: float) -> str:
    """A count of things: exact with thousands separators below 100,000, then `123k`, `4.56M`, `7.89B`."""
    if not math.isfinite(value):
        return _format_nonfinite(value)
    if abs(value) < 99_999.5:
        return f"{value:,.0f}"
    return _scale_count(value)


def format_rate(value: float) -> str:
    """Things per second: `0.53`, `34.1`, `870`, `12.3k`."""
    if not math.isfinite(value):
        return _format_nonfinite(value)
    if abs(value) < 999.5:
        return f"{value:.3g}"
    return _scale_count(value)


def format_duration(seconds: float) -> str:
    """A time span in its two largest units: `0.45 s`, `12 s`, `3 min 20 s`, `5 h 02 min`, `2 d 03 h`."""
    if not math.isfinite(seconds):
        return _format_nonfinite(seconds)
    if seconds < 10:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    minutes, rest_s = divmod(whole, 60)
    hours, rest_min = divmod(minutes, 60)
    days, rest_h = divmod(hours, 24)
    if minutes == 0:
        return f"{whole} s"
    if hours == 0:
        return f"{minutes} min {rest_s:02d} s"
    if days == 0:
        return f"{hours} h {rest_min:02d} min"
    return f"{days} d {rest_h:02d} h"


def format_clock(seconds: float) -> str:
    """A time span as `h:mm:ss`, for columns and progress lines; `-:--:--` where it is not known."""
    if not math.isfinite(seconds):
        return "-:--:--"
    minutes, rest_s = divmod(round(max(0.0, seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest_s:02d}"


def format_percent(share: float) -> str:
    """A share of 1 as a percentage; 0 % and 100 % are only said where they are exact."""
    if not math.isfinite(share):
        return _format_nonfinite(share)
    percent = 100 * share
    if 0 < percent < 0.1:
        return "< 0.1%"
    if 99.95 <= percent < 100:
        return "> 99.9%"
    return f"{percent:.3g}%"


def _scale_count(value: float) -> str:
    for size, unit in _COUNT_UNITS:
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _format_nonfinite(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "∞" if value > 0 else "-∞"
