"""What is in a data set, as histograms: turns, characters, tokens, images, answers; and what padding would cost."""

import functools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megavlm.data.bin_packing import best_fit_decreasing
from megavlm.data.encode import SampleEncoder
from megavlm.data.images import read_image_size
from megavlm.data.inspect.processes import map_items
from megavlm.data.inspect.rows import read_row
from megavlm.data.messages import ANSWER_ROLES
from megavlm.data.readers import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from megavlm.data.sample import Sample
from megavlm.errors import UseError

NUM_BARS = 12
"""Of a histogram, about."""
WINDOW_ROWS = 1024
"""Rows that are packed together when packing is estimated; training packs those of one step."""
_MANY = 40
"""Most names of channels that are counted each on its own."""


@dataclass(frozen=True)
class RowFigures:
    """Figures of one row; those of tokens are 0 without an encoder, or where `problem` says why there are none."""

    num_turns: int = 0
    num_characters: int = 0
    answer_characters: tuple[int, ...] = ()
    image_sizes: tuple[tuple[int, int], ...] = ()
    num_videos: int = 0
    channel: str = ""
    num_tokens: int = 0
    num_learned: int = 0
    num_visual: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Histogram:
    """Counts of values by ranges, or of names.

    Attributes:
        name: identifier.
        title: what is counted.
        unit: of the values; empty: names are counted.
        bars: (label, count), in order.
        figures: least, mean, median, 95th percentile, largest; empty for names.
    """

    name: str
    title: str
    unit: str
    bars: tuple[tuple[str, int], ...]
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Padding:
    """What a way to make batches would fill with padding: `share` of all tokens that go through the model."""

    way: str
    num_packs: int
    share: float


@dataclass(frozen=True)
class Stats:
    """What `gather` found.

    Attributes:
        num_rows: all rows.
        problems: rows that are left out of the histograms, with why.
        totals: sums over the others.
        histograms: those that there is something to count for.
        padding: with an encoder, for rows that are not too long.
        num_too_long: rows above max_length.
    """

    num_rows: int
    problems: tuple[str, ...]
    totals: dict[str, int]
    histograms: tuple[Histogram, ...]
    padding: tuple[Padding, ...] = ()
    num_too_long: int = 0


def gather(
    samples: Sequence[Sample],
    encoder: SampleEncoder | None = None,
    *,
    max_length: int = 4096,
    packing_length: int = 0,
    nproc: int = 1,
) -> Stats:
    """Look at all rows; headers of images are read, not their pixels.

    Args:
        samples: all rows; one that cannot be read or encoded is left out and named.
        encoder: for figures of tokens, of rows of any length; None: none.
        max_length: longest sample in tokens, for padding.
        packing_length: longest packed row; 0: max_length.
        nproc: processes.
    """
    work = functools.partial(measure, samples, encoder)
    found = list(map_items(work, range(len(samples)), nproc))
    rows = [row for row in found if not row.problem]
    totals = {
        "turns": sum(row.num_turns for row in rows),
        "characters": sum(row.num_characters for row in rows),
        "images": sum(len(row.image_sizes) for row in rows),
        "videos": sum(row.num_videos for row in rows),
    }
    padding: tuple[Padding, ...] = ()
    num_too_long = 0
    if encoder is not None:
        totals["tokens"] = sum(row.num_tokens for row in rows)
        totals["learned tokens"] = sum(row.num_learned for row in rows)
        totals["visual tokens"] = sum(row.num_visual for row in rows)
        lengths_N = np.array([row.num_tokens for row in rows], dtype=np.int64)
        num_too_long = int((lengths_N > max_length).sum())
        padding = padding_of(lengths_N[lengths_N <= max_length], max_length, packing_length or max_length)
    return Stats(
        num_rows=len(samples),
        problems=tuple(row.problem for row in found if row.problem),
        totals=totals,
        histograms=tuple(_histograms(rows, encoder is not None)),
        padding=padding,
        num_too_long=num_too_long,
    )


def measure(samples: Sequence[Sample], encoder: SampleEncoder | None, row: int) -> RowFigures:
    """Figures of one row."""
    sample = read_row(samples, row)
    if isinstance(sample, UseError):
        return RowFigures(problem=str(sample))
    texts = [turn.text.replace(IMAGE_PLACEHOLDER, "").replace(VIDEO_PLACEHOLDER, "") for turn in sample.turns]
    answers = [text for turn, text in zip(sample.turns, texts, strict=True) if turn.role in ANSWER_ROLES]
    tokens = (0, 0, 0)
    try:
        sizes = tuple(read_image_size(image) for image in sample.images)
        if encoder is not None:
            encoded = encoder.encode(sample)
            tokens_S, weights_S = encoded.tokens_S, encoded.loss_weights_S(encoder.token_schedule.last)
            visual = int((tokens_S == encoder.inputs.image_token_id).sum())
            tokens = (len(tokens_S), int((weights_S != 0).sum()), visual)
    except UseError as error:
        return RowFigures(problem=str(error))
    return RowFigures(
        num_turns=len(sample.turns),
        num_characters=sum(map(len, texts)),
        answer_characters=tuple(map(len, answers)),
        image_sizes=sizes,
        num_videos=len(sample.videos),
        channel=sample.task,
        num_tokens=tokens[0],
        num_learned=tokens[1],
        num_visual=tokens[2],
    )


def padding_of(lengths_N: np.ndarray, max_length: int, packing_length: int) -> tuple[Padding, ...]:
    """Shares of padding: each row on its own up to max_length, and rows packed into packs of packing_length.

    Args:
        lengths_N: int64 tokens of rows, none above max_length.
        max_length: that a row alone would be padded to.
        packing_length: of a pack.
    """
    if not len(lengths_N) or max(lengths_N) > packing_length:
        return ()
    total = int(lengths_N.sum())
    num_packs = 0
    for start in range(0, len(lengths_N), WINDOW_ROWS):
        num_packs += int(best_fit_decreasing(lengths_N[start : start + WINDOW_ROWS], packing_length).max()) + 1
    return (
        Padding(f"each row padded to {max_length:,}", len(lengths_N), 1 - total / (len(lengths_N) * max_length)),
        Padding(f"packed, {packing_length:,} a pack", num_packs, 1 - total / (num_packs * packing_length)),
    )


def _histograms(rows: Sequence[RowFigures], has_tokens: bool) -> Iterable[Histogram]:
    sizes = [size for row in rows for size in row.image_sizes]
    answers = [length for row in rows for length in row.answer_characters]
    yield from (
        one
        for one in (
            histogram("turns", "Turns of a row", "turns", [row.num_turns for row in rows]),
            histogram("characters", "Characters of a row", "characters", [row.num_characters for row in rows]),
            histogram("answers", "Length of an answer", "characters", answers),
            histogram("images", "Images of a row", "images", [len(row.image_sizes) for row in rows]),
            histogram("pixels", "Area of an image", "pixels", [width * height for width, height in sizes]),
            histogram(
                "aspect", "Width of an image over its height", "ratio", [width / height for width, height in sizes]
            ),
        )
        if one is not None
    )
    if has_tokens:
        for name, title, values in (
            ("tokens", "Tokens of a row", [row.num_tokens for row in rows]),
            ("learned", "Learned tokens of a row", [row.num_learned for row in rows]),
            ("visual", "Visual tokens of a row", [row.num_visual for row in rows]),
        ):
            one = histogram(name, title, "tokens", values)
            if one is not None:
                yield one
    channels = Counter(row.channel for row in rows)
    if len(channels) > 1 or "" not in channels:
        common = channels.most_common(_MANY)
        rest = len(rows) - sum(count for _, count in common)
        bars = [(name or "(none)", count) for name, count in common] + ([("(others)", rest)] if rest else [])
        yield Histogram("channels", "Rows by channel or task", "", tuple(bars))


def histogram(name: str, title: str, unit: str, values: Sequence[float]) -> Histogram | None:
    """Counts by ranges: of single numbers where there are few, of equal width, or doubling where they spread far.

    Args:
        name: identifier.
        title: what is counted.
        unit: of the values.
        values: not negative.

    Returns:
        None where there are no values, or all are 0.
    """
    values_N = np.asarray(values, dtype=np.float64)
    if not len(values_N) or not values_N.any():
        return None
    whole = bool((values_N == np.round(values_N)).all())
    edges = _edges(float(values_N.min()), float(values_N.max()), whole)
    counts, _ = np.histogram(values_N, edges)
    figures = {
        "least": values_N.min(),
        "mean": values_N.mean(),
        "median": np.median(values_N),
        "95%": np.percentile(values_N, 95),
        "largest": values_N.max(),
    }
    bars = tuple(
        (_label(low, high, whole), int(count)) for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    )
    return Histogram(name, title, unit, bars, {key: float(value) for key, value in figures.items()})


def _edges(low: float, high: float, whole: bool) -> np.ndarray:
    """Of half-open ranges; the last one ends behind the largest value."""
    if whole and high - low < NUM_BARS:
        return np.arange(low, high + 2)
    if high > 32 * max(low, 1 if whole else low) or (low and high > 32 * low):
        first = math.floor(math.log2(low)) if low else -1
        last = math.floor(math.log2(high)) + 1
        doubling = [2.0**exponent for exponent in range(max(first, 0) if whole else first, last + 1)]
        return np.array(([0.0] if low < doubling[0] else []) + doubling)
    raw = (high - low) / NUM_BARS or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    start = math.floor(low / step + 1e-9)
    stop = math.floor(high / step + 1e-9) + 1
    edges: np.ndarray = np.arange(start, stop + 1) * step
    return edges


def _label(low: float, high: float, whole: bool) -> str:
    if not whole:
        return f"{low:.3g} to {high:.3g}"
    return f"{low:,.0f}" if high - low == 1 else f"{low:,.0f} to {high - 1:,.0f}"
