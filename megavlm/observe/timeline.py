"""The timeline of one training step: what every pipeline rank did when, as it was measured and as it was simulated.

The file `timeline.json` of a run folder holds one `Timeline`, its fields by their names, `version` and `unit` beside
them. Shape suffixes: R pipeline ranks, M microbatches.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from megavlm.errors import use_error
from megavlm.observe.files import replace_text
from megavlm.observe.timeline_fields import Fields

TIMELINE_NAME = "timeline.json"
VERSION = 1
UNIT = "s"

ENCODER_KINDS = ("E", "EF", "EB")
"""Encoder forward that keeps features only, forward, backward."""
LANGUAGE_KINDS = ("F", "B")
"""Language model, forward and backward of a chunk."""
MESSAGE_KINDS = ("send", "receive")
"""Time in handing over a message, and time in waiting for one."""
REDUCE_KIND = "reduce"
"""The gradient reduction behind the schedule."""
KINDS = (*ENCODER_KINDS, *LANGUAGE_KINDS, *MESSAGE_KINDS, REDUCE_KIND)

PAYLOADS = ("activation", "gradient", "features", "feature_gradient", "vision_activation", "vision_gradient")

_OVERLAP = 1e-6
"""Part of the makespan by which times may contradict each other: rounding, not a wrong clock."""


@dataclass(frozen=True, slots=True)
class TimelineEvent:
    """Something that took time on a rank.

    Attributes:
        kind: one of `KINDS`.
        start_s: seconds since the step began on the first rank; all ranks read one clock.
        end_s: not before `start_s`.
        microbatch: from 0; 0 for `reduce`.
        chunk: the rank's language-model chunk, for a message the destination's; 0 for the encoder and `reduce`.
        payload: what a message holds, one of `PAYLOADS`; None for everything else.
        peer: pipeline rank at the other end of a message, the own one where ranks of one position hand parts to each
            other; None for everything else.
    """

    kind: str
    start_s: float
    end_s: float
    microbatch: int = 0
    chunk: int = 0
    payload: str | None = None
    peer: int | None = None


@dataclass(frozen=True)
class Band:
    """One course of the step.

    Attributes:
        ranks: per pipeline rank its events in order, none overlapping.
        makespan_s: until the last rank has finished.
    """

    ranks: tuple[tuple[TimelineEvent, ...], ...]
    makespan_s: float


@dataclass(frozen=True)
class Timeline:
    """One step, measured, and simulated where the costs were calibrated.

    Attributes:
        step: optimizer step, from 1.
        placement: place of the encoder.
        layout: as the run says it, e.g. `TP2 x PP2`.
        num_microbatches: of one data rank.
        pad_share: padding tokens over all tokens of the step, 0..1.
        encoder_costs_RM: cost of the encoder's work of each pipeline rank on each microbatch, in any one unit.
        language_costs_RM: the language model's, in the same unit.
        measured: by the clock of the machine.
        simulated: None: no costs were calibrated.
    """

    step: int
    placement: str
    layout: str
    num_microbatches: int
    pad_share: float
    encoder_costs_RM: tuple[tuple[float, ...], ...]
    language_costs_RM: tuple[tuple[float, ...], ...]
    measured: Band
    simulated: Band | None = None

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks."""
        return len(self.measured.ranks)


def write_timeline(path: str | Path, timeline: Timeline) -> Path:
    """Write a timeline (to `TIMELINE_NAME` in the run folder, where the report looks for it), and return its path.

    Raises:
        UseError: it contradicts itself; names the key.
        RunError: the file cannot be written.
    """
    entry = {"version": VERSION, "unit": UNIT, **dataclasses.asdict(timeline)}
    for band in (entry["measured"], entry["simulated"]):
        if band is not None:
            band["ranks"] = [[_without_none(event) for event in row] for row in band["ranks"]]
    # Through text, as a reader will see it: tuples become lists.
    text = json.dumps(entry, separators=(",", ":"))
    _timeline(Fields(str(path), "", json.loads(text)))
    return replace_text(Path(path), text + "\n")


def read_timeline(path: str | Path) -> Timeline:
    """Read what `write_timeline` wrote.

    Raises:
        UseError: there is no such file, it is no JSON, or a value cannot be; names the file and the key.
    """
    try:
        entry = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise use_error(str(path), "no such file", "the timeline of a run", "record a step first") from None
    except ValueError as error:
        raise use_error(str(path), str(error), "JSON", "record the step again, or remove the file") from None
    return _timeline(Fields(str(path), "", entry))


def _without_none(event: dict) -> dict:
    return {name: value for name, value in event.items() if value is not None}


def _timeline(fields: Fields) -> Timeline:
    names = {"version", "unit", *(field.name for field in dataclasses.fields(Timeline))}
    fields.check_names(required=names - {"simulated"}, optional={"simulated"})
    fields.choice("version", (VERSION,))
    fields.choice("unit", (UNIT,))
    num_microbatches = fields.integer("num_microbatches", at_least=1)
    shape = len(fields.child("measured").entries("ranks", at_least=1)), num_microbatches
    return Timeline(
        step=fields.integer("step"),
        placement=fields.text("placement"),
        layout=fields.text("layout"),
        num_microbatches=num_microbatches,
        pad_share=fields.number("pad_share", at_most=1.0),
        encoder_costs_RM=fields.table("encoder_costs_RM", *shape),
        language_costs_RM=fields.table("language_costs_RM", *shape),
        measured=_band(fields.child("measured"), *shape),
        simulated=None if fields.is_null("simulated") else _band(fields.child("simulated"), *shape),
    )


def _band(fields: Fields, num_ranks: int, num_microbatches: int) -> Band:
    fields.check_names(required={"ranks", "makespan_s"})
    makespan_s = fields.number("makespan_s", above=0.0)
    rows = []
    if len(fields.entries("ranks")) != num_ranks:
        fields.fail("ranks", f"{len(fields.entries('ranks'))} ranks", f"{num_ranks}, one list for each pipeline rank")
    for rank in range(num_ranks):
        row: list[TimelineEvent] = []
        for position in fields.rows("ranks", rank):
            event = _event(position, num_ranks, num_microbatches)
            free_s = row[-1].end_s if row else 0.0
            slack_s = _OVERLAP * makespan_s
            if event.start_s < free_s - slack_s:
                position.fail("start_s", event.start_s, f"at least {free_s:g}, the end of the event before it")
            if not event.start_s <= event.end_s <= makespan_s + slack_s:
                position.fail("end_s", event.end_s, f"start_s..makespan_s, {event.start_s:g}..{makespan_s:g}")
            row.append(event)
        rows.append(tuple(row))
    return Band(tuple(rows), makespan_s)


def _event(fields: Fields, num_ranks: int, num_microbatches: int) -> TimelineEvent:
    kind = fields.choice("kind", KINDS)
    of_message = {"payload", "peer"} if kind in MESSAGE_KINDS else set()
    fields.check_names(required={"kind", "start_s", "end_s", "microbatch", "chunk", *of_message})
    return TimelineEvent(
        kind=kind,
        start_s=fields.number("start_s"),
        end_s=fields.number("end_s"),
        microbatch=fields.integer("microbatch", below=num_microbatches),
        chunk=fields.integer("chunk"),
        payload=fields.choice("payload", PAYLOADS) if of_message else None,
        peer=fields.integer("peer", below=num_ranks) if of_message else None,
    )
