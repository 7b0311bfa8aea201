"""What the page shows of a timeline, as plain texts and numbers; `timeline.html.j2` and `timeline.js` draw it.

Shape suffixes: R pipeline ranks, M microbatches.
"""

import math
from dataclasses import dataclass

from megavlm.observe.formats import format_percent
from megavlm.observe.report_summary import Fact
from megavlm.observe.timeline import KINDS, PAYLOADS, Band, Timeline
from megavlm.observe.timeline_figures import (
    CAUSE_OF_PAYLOAD,
    BandFigures,
    Imbalance,
    add_costs,
    measure_imbalance,
    measured_over_simulated,
    summarize,
)
from megavlm.observe.timeline_tables import (
    CAUSE_LABELS,
    NOTHING,
    Table,
    Unit,
    choose_unit,
    cost_table,
    format_ratio,
    idle_table,
    imbalance_table,
)
from megavlm.observe.timeline_text import LEGEND, draw_text

_DIGITS = 7


@dataclass(frozen=True)
class BandText:
    """A band in letters."""

    name: str
    text: str


@dataclass(frozen=True)
class TimelineView:
    """Everything the template shows.

    Attributes:
        title: which step it is.
        facts: the figures in front.
        kinds: kinds of events that there are, for the legend.
        has_chunks: whether a rank holds several language-model chunks.
        drawing: what the script draws.
        texts: the bands where no script runs.
        text_legend: of these.
        idle: idle time by cause.
        unit: of the times in it.
        imbalance: of the costs.
        by_rank: costs, rank by rank.
        by_microbatch: costs, microbatch by microbatch.
    """

    title: str
    facts: tuple[Fact, ...]
    kinds: frozenset[str]
    has_chunks: bool
    drawing: dict
    texts: tuple[BandText, ...]
    text_legend: str
    idle: Table
    unit: str
    imbalance: Table
    by_rank: Table
    by_microbatch: Table


def build_timeline_view(timeline: Timeline) -> TimelineView:
    """Lay out a timeline for the page."""
    bands = _bands(timeline)
    events = [event for band in bands.values() for row in band.ranks for event in row]
    figures = {name: summarize(band) for name, band in bands.items()}
    unit = choose_unit(max(band.makespan_s for band in bands.values()))
    both_RM = add_costs(timeline.encoder_costs_RM, timeline.language_costs_RM)
    parts = {
        "Encoder": timeline.encoder_costs_RM,
        "Language model": timeline.language_costs_RM,
        "Both": both_RM,
    }
    imbalances = {name: measure_imbalance(costs_RM) for name, costs_RM in parts.items()}
    return TimelineView(
        title=f"step {timeline.step:,} · {timeline.placement} · {timeline.layout} · "
        + f"{timeline.num_microbatches} microbatch{'' if timeline.num_microbatches == 1 else 'es'}",
        facts=_facts(timeline, figures, imbalances["Both"], unit),
        kinds=frozenset(event.kind for event in events),
        has_chunks=any(event.chunk for event in events),
        drawing=_drawing(bands),
        texts=tuple(BandText(name, draw_text(band)) for name, band in bands.items()),
        text_legend=LEGEND,
        idle=idle_table(figures, timeline.num_ranks, unit),
        unit=unit.name,
        imbalance=imbalance_table(imbalances),
        by_rank=cost_table(
            "Rank", "over microbatches", parts, {n: i.over_microbatches_R for n, i in imbalances.items()}
        ),
        by_microbatch=cost_table(
            "Microbatch",
            "over ranks",
            {name: tuple(zip(*costs_RM, strict=True)) for name, costs_RM in parts.items()},
            {name: imbalance.over_ranks_M for name, imbalance in imbalances.items()},
        ),
    )


def _bands(timeline: Timeline) -> dict[str, Band]:
    """By name, in the order of the page."""
    simulated = {} if timeline.simulated is None else {"simulated": timeline.simulated}
    return {**simulated, "measured": timeline.measured}


def _facts(timeline: Timeline, figures: dict[str, BandFigures], both: Imbalance, unit: Unit) -> tuple[Fact, ...]:
    measured = figures["measured"]
    simulated = figures.get("simulated")
    drift = measured_over_simulated(timeline)
    cause, share = max(measured.idle_share.items(), key=lambda item: item[1])
    length = "not simulated" if simulated is None else f"simulated {unit.say(simulated.schedule_s)}"
    bubble = (
        f"{format_percent(measured.idle_over_work)} of the work" if measured.idle_over_work < math.inf else "no work"
    )
    if simulated is not None:
        bubble += f"; simulated {format_percent(simulated.bubble_share)}"
    return (
        Fact("Schedule, measured", unit.say(measured.schedule_s), length),
        Fact("Measured over simulated", NOTHING if drift is None else f"{100 * drift:+.1f}%", "schedule only"),
        Fact("Step, measured", unit.say(measured.makespan_s), "with the gradient reductions"),
        Fact("Bubble share", format_percent(measured.bubble_share), bubble),
        Fact("Largest idle cause", CAUSE_LABELS[cause], f"{format_percent(share)} of makespan × ranks"),
        Fact("Ranks, max / mean", format_ratio(both.ranks), "cost of encoder and language model"),
        Fact("Microbatches, max / mean", format_ratio(both.microbatches), "cost of encoder and language model"),
        Fact("Pad share", format_percent(timeline.pad_share), "of all tokens"),
    )


def _drawing(bands: dict[str, Band]) -> dict:
    """Each lane is one flat list: kind, microbatch, chunk, payload, peer, start, end of its events in turn."""
    return {
        "kinds": KINDS,
        "payloads": PAYLOADS,
        "causes": [CAUSE_LABELS[CAUSE_OF_PAYLOAD[payload]] for payload in PAYLOADS],
        "bands": [
            {
                "name": name,
                "makespan": _round(band.makespan_s, band.makespan_s),
                "lanes": [_lane(band, rank) for rank in range(len(band.ranks))],
            }
            for name, band in bands.items()
        ],
    }


def _lane(band: Band, rank: int) -> list[float]:
    lane: list[float] = []
    for event in band.ranks[rank]:
        payload = -1 if event.payload is None else PAYLOADS.index(event.payload)
        peer = -1 if event.peer is None else event.peer
        lane += [KINDS.index(event.kind), event.microbatch, event.chunk, payload, peer]
        lane += [_round(event.start_s, band.makespan_s), _round(event.end_s, band.makespan_s)]
    return lane


def _round(seconds: float, makespan_s: float) -> float:
    """To `_DIGITS` digits of the makespan: finer than a page shows, and a third of the text."""
    return round(seconds, _DIGITS - 1 - math.floor(math.log10(makespan_s)))
