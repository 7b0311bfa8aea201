"""The tables of a timeline on the page, as texts.

Shape suffixes: R pipeline ranks, M microbatches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megavlm.observe.formats import format_percent
from megavlm.observe.timeline import ENCODER_KINDS, LANGUAGE_KINDS, REDUCE_KIND
from megavlm.observe.timeline_figures import CAUSES, BandFigures, Imbalance, max_over_mean

NOTHING = "–"
CAUSE_LABELS = {
    "activation": "activation",
    "gradient": "gradient",
    "features": "features",
    "encode": "encoder’s input",
    "drained": "done",
    "between": "between",
}
_PARTS = (
    ("Encoder", ENCODER_KINDS),
    ("Language model", LANGUAGE_KINDS),
    ("Sending", ("send",)),
    ("Reduction", (REDUCE_KIND,)),
)


@dataclass(frozen=True)
class Cell:
    """A figure of a table; `share` is drawn as a bar behind it, 0..1."""

    text: str
    share: float = 0.0


@dataclass(frozen=True)
class Line:
    """A row of a table; `group` is the first cell where it spans `span` rows, else empty."""

    label: str
    cells: tuple[Cell, ...]
    group: str = ""
    span: int = 1
    is_total: bool = False


@dataclass(frozen=True)
class Table:
    """One table; `columns` name the cells, not the labels in front of them."""

    columns: tuple[str, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Unit:
    """A unit for all times of a page, so that they compare."""

    name: str
    seconds: float
    decimals: int

    def show(self, seconds: float) -> str:
        """The number alone."""
        return f"{seconds / self.seconds:,.{self.decimals}f}"

    def say(self, seconds: float) -> str:
        """With the unit."""
        return f"{self.show(seconds)} {self.name}"


def choose_unit(makespan_s: float) -> Unit:
    """The unit that shows four digits of the makespan or more."""
    name, seconds = next(
        ((name, size) for name, size in (("s", 1.0), ("ms", 1e-3)) if makespan_s >= 0.9995 * size), ("µs", 1e-6)
    )
    return Unit(name, seconds, max(0, 3 - math.floor(math.log10(makespan_s / seconds * 1.0005))))


def idle_table(figures: dict[str, BandFigures], num_ranks: int, unit: Unit) -> Table:
    """Per rank and for all: what each band did and waited for."""
    causes = CAUSES if any(one.idle_share["between"] for one in figures.values()) else CAUSES[:-1]
    lines = []
    for rank in range(num_ranks):
        for number, (name, one) in enumerate(figures.items()):
            busy, idle = one.busy_R[rank], one.idle_R[rank]
            seconds = [sum(busy[kind] for kind in kinds) for _, kinds in _PARTS]
            seconds += [sum(idle.values()), *(idle[cause] for cause in causes)]
            cells = tuple(Cell(unit.show(value) if value else "0", value / one.makespan_s) for value in seconds)
            group = "" if number else f"rank {rank}"
            lines.append(Line(name, cells, group, len(figures)))
    for number, (name, one) in enumerate(figures.items()):
        shares = [sum(one.busy_share[kind] for kind in kinds) for _, kinds in _PARTS]
        shares += [one.bubble_share, *(one.idle_share[cause] for cause in causes)]
        cells = tuple(Cell(format_percent(share), share) for share in shares)
        lines.append(Line(name, cells, "" if number else "all ranks", len(figures), is_total=True))
    columns = (*(name for name, _ in _PARTS), "Idle", *(CAUSE_LABELS[cause] for cause in causes))
    return Table(columns, tuple(lines))


def imbalance_table(imbalances: dict[str, Imbalance]) -> Table:
    """Maximum over mean of each part, one line a part."""
    lines = []
    for name, one in imbalances.items():
        texts = [format_ratio(one.ranks), format_ratio(one.microbatches)]
        texts += [*_mean_and_worst(one.over_ranks_M, "microbatch"), *_mean_and_worst(one.over_microbatches_R, "rank")]
        lines.append(Line(name, tuple(Cell(text) for text in texts), is_total=name == "Both"))
    columns = (
        "totals of ranks",
        "totals of microbatches",
        "ranks within a microbatch, mean",
        "worst",
        "microbatches within a rank, mean",
        "worst",
    )
    return Table(columns, tuple(lines))


def cost_table(
    head: str,
    inner: str,
    parts: dict[str, Sequence[Sequence[float]]],
    ratios: dict[str, tuple[float | None, ...]],
) -> Table:
    """One line a rank (or microbatch): its cost over the mean of all of them, and max / mean within it."""
    totals = {name: [sum(row) for row in costs] for name, costs in parts.items()}
    lines = []
    for index in range(len(totals["Both"])):
        cells = []
        for name, values in totals.items():
            mean = sum(values) / len(values)
            relative = values[index] / mean if mean else None
            largest = max_over_mean(values)
            share = relative / largest if relative is not None and largest else 0.0
            cells += [Cell(format_ratio(relative), share), Cell(format_ratio(ratios[name][index]))]
        lines.append(Line(f"{head.lower()} {index}", tuple(cells)))
    columns = tuple(column for name in parts for column in (f"{name}: cost / mean", f"{name}: max / mean {inner}"))
    return Table(columns, tuple(lines))


def _mean_and_worst(ratios: Sequence[float | None], noun: str) -> tuple[str, str]:
    known = [(ratio, index) for index, ratio in enumerate(ratios) if ratio is not None]
    if not known:
        return NOTHING, NOTHING
    worst, index = max(known, key=lambda item: item[0])
    return format_ratio(sum(ratio for ratio, _ in known) / len(known)), f"{format_ratio(worst)} ({noun} {index})"


def format_ratio(value: float | None) -> str:
    """To three decimals; a dash where there is none."""
    return NOTHING if value is None else f"{value:.3f}"
