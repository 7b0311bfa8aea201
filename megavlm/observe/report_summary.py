"""What a report says in words and numbers: headlines, facts, warnings, events, and what the run ran on."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from megavlm.observe.formats import (
    format_clock,
    format_count,
    format_duration,
    format_number,
    format_percent,
    format_rate,
)
from megavlm.observe.report_charts import HELD_OUT_SHARES, Row, number
from megavlm.observe.report_samples import ShownSample, share_right

MAX_EVENTS = 300
_SESSION_STARTS = ("start", "resume")
_LAYOUT_KEYS = (
    ("TP", "tensor_model_parallel_size"),
    ("PP", "pipeline_model_parallel_size"),
    ("VPP", "virtual_pipeline_model_parallel_size"),
    ("CP", "context_parallel_size"),
    ("EP", "expert_model_parallel_size"),
)


@dataclass(frozen=True)
class Headline:
    """A result, as it was at first and at last; `first` is empty where there is only one value."""

    label: str
    first: str
    last: str
    note: str


@dataclass(frozen=True)
class Fact:
    """A small figure under the headlines."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class EventLine:
    """A line of the event list."""

    step: str
    elapsed: str
    time: str
    kind: str
    text: str


@dataclass(frozen=True)
class Totals:
    """Sums over the logged steps; a row speaks for the steps since the row before it."""

    tokens: float
    supervised_tokens: float
    images: float
    step_s: float


def list_headlines(rows: Sequence[Row], samples: Sequence[ShownSample]) -> list[Headline]:
    """The results of the run: exact match, shares, evaluation loss, training loss; those that were measured."""
    shares = [_share(rows, name, label) for name, (label, _) in HELD_OUT_SHARES.items() if name != "exact_match"]
    return [
        headline
        for headline in (_exact_match(rows, samples), *shares, _loss(rows, "eval"), _loss(rows, "train"))
        if headline is not None
    ]


def list_facts(rows: Sequence[Row], recipe: dict) -> list[Fact]:
    """How much was done, how fast, and on which layout."""
    train = [row for row in rows if row["kind"] == "train"]
    totals = add_up(rows)
    total_steps = _latest(rows, "total_steps")
    last_step = train[-1]["step"] if train else 0
    facts = [Fact("Steps", f"{last_step:,}" + (f" of {int(total_steps):,}" if total_steps else ""))]
    if train:
        facts += [
            Fact("Samples", format_count(number(train[-1], "consumed_samples"))),
            Fact("Tokens", format_count(totals.tokens), f"{format_count(totals.supervised_tokens)} supervised"),
            Fact("Images", format_count(totals.images)),
            Fact(
                "Mean throughput",
                f"{_rate(totals.tokens, totals)} tokens/s",
                f"{_rate(totals.images, totals)} images/s",
            ),
            Fact("Mean step time", format_duration(totals.step_s / max(1, _num_steps(rows)))),
        ]
    facts.append(Fact("Wall time", format_duration(wall_s(rows)), _count_noun(_num_sessions(rows), "attempt")))
    layout, note = _layout(rows, recipe)
    return [*facts, Fact("Layout", layout, note)] if layout else facts


def list_alerts(rows: Sequence[Row]) -> list[str]:
    """What a reader must know before believing the rest."""
    train = [row for row in rows if row["kind"] == "train"]
    if not train:
        return ["No training step was logged."]
    alerts = []
    bad = [row["step"] for row in train if not all(math.isfinite(number(row, name)) for name in ("loss", "grad_norm"))]
    if bad:
        steps = f"first at step {bad[0]:,}, last at step {bad[-1]:,}" if len(bad) > 1 else f"step {bad[0]:,}"
        alerts.append(f"Loss or gradient norm was not finite in {_count_noun(len(bad), 'logged step')}: {steps}.")
    total_steps = _latest(rows, "total_steps")
    if total_steps and train[-1]["step"] < total_steps:
        alerts.append(f"The log ends at step {train[-1]['step']:,} of {int(total_steps):,}.")
    return alerts


def list_events(rows: Sequence[Row]) -> list[EventLine]:
    """Everything but training steps, in order; of very many, the latest."""
    start_s = _times(rows)[0] if _times(rows) else math.nan
    lines = [_event_line(row, start_s) for row in rows if row["kind"] != "train"]
    if len(lines) <= MAX_EVENTS:
        return lines
    left_out = EventLine("", "", "", "", f"{len(lines) - MAX_EVENTS:,} earlier events are in metrics.jsonl")
    return [left_out, *lines[-MAX_EVENTS:]]


def started_at(rows: Sequence[Row]) -> str:
    """When the first row was written; empty where no row says."""
    times = _times(rows)
    return _format_time(times[0]) if times else ""


def list_settings(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The environment that the latest attempt recorded: (what, value)."""
    environment = _latest(rows, "environment")
    return [(str(name), str(value)) for name, value in environment.items()] if isinstance(environment, dict) else []


def add_up(rows: Sequence[Row]) -> Totals:
    """Tokens, images and seconds of all steps; values that are not finite are left out."""
    sums = [0.0, 0.0, 0.0, 0.0]
    for row, num_steps in _with_num_steps(rows):
        seconds = number(row, "step_s") * num_steps
        parts = (
            number(row, "tokens_per_second") * seconds,
            number(row, "num_tokens") * num_steps,
            number(row, "images_per_second") * seconds,
            seconds,
        )
        sums = [total + part if math.isfinite(part) else total for total, part in zip(sums, parts, strict=True)]
    return Totals(*sums)


def wall_s(rows: Sequence[Row]) -> float:
    """Seconds from the first to the last row of every attempt, without the time between attempts."""
    total, start, last = 0.0, math.nan, math.nan
    for row in rows:
        time_s = number(row, "time")
        if not math.isfinite(time_s):
            continue
        if math.isnan(start) or row.get("event") in _SESSION_STARTS:
            total += 0.0 if math.isnan(start) else last - start
            start = time_s
        last = time_s
    return total + (0.0 if math.isnan(start) else last - start)


def _with_num_steps(rows: Sequence[Row]) -> Iterable[tuple[Row, int]]:
    """Training rows, each with how many steps it speaks for."""
    previous = 0
    for row in rows:
        if row["kind"] == "train":
            yield row, max(1, row["step"] - previous)
        if row["kind"] == "train" or row.get("event") in _SESSION_STARTS:
            previous = row["step"]


def _num_steps(rows: Sequence[Row]) -> int:
    return sum(num_steps for row, num_steps in _with_num_steps(rows) if math.isfinite(number(row, "step_s")))


def _rate(amount: float, totals: Totals) -> str:
    return format_rate(amount / totals.step_s) if totals.step_s > 0 else "–"


def _num_sessions(rows: Sequence[Row]) -> int:
    return max(1, sum(row.get("event") in _SESSION_STARTS for row in rows))


def _times(rows: Sequence[Row]) -> list[float]:
    return [number(row, "time") for row in rows if math.isfinite(number(row, "time"))]


def _latest(rows: Sequence[Row], name: str) -> Any:
    return next((row[name] for row in reversed(rows) if row.get("event") in _SESSION_STARTS and name in row), None)


def _count_noun(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _loss(rows: Sequence[Row], kind: str) -> Headline | None:
    measured = [row for row in rows if row["kind"] == kind and "loss" in row]
    if not measured:
        return None
    label = "Evaluation loss" if kind == "eval" else "Training loss"
    values = [number(row, "loss") for row in measured]
    finite = [(value, row["step"]) for value, row in zip(values, measured, strict=True) if math.isfinite(value)]
    note = f"at step {measured[-1]['step']:,}"
    if len(values) == 1:
        return Headline(label, "", format_number(values[0]), note)
    if finite:
        note = f"lowest {format_number(min(finite)[0])} at step {min(finite)[1]:,}"
    return Headline(label, format_number(values[0]), format_number(values[-1]), note)


def _share(rows: Sequence[Row], name: str, label: str) -> Headline | None:
    """What evaluations measured as a share of 1."""
    measured = [row for row in rows if row["kind"] == "eval" and name in row]
    if not measured:
        return None
    shares = [format_percent(number(row, name)) for row in measured]
    note = f"of held-out rows, at step {measured[-1]['step']:,}"
    return Headline(label, shares[0] if len(shares) > 1 else "", shares[-1], note)


def _exact_match(rows: Sequence[Row], samples: Sequence[ShownSample]) -> Headline | None:
    """From the log where it was measured there, else from the samples of the gallery."""
    label = "Exact match"
    shares, num_answers = [], math.nan
    for row in rows:
        found = [row[name] for name in ("exact_match_before", "exact_match", "exact_match_after") if name in row]
        if found and row["kind"] != "train":
            shares += [float(share) for share in found]
            num_answers = number(row, "num_samples")
    if shares:
        note = f"of {num_answers:,.0f} held-out answers" if math.isfinite(num_answers) else "of held-out answers"
    else:
        shares = [
            share
            for share in (share_right([one.before for one in samples]), share_right([one.after for one in samples]))
            if share is not None
        ]
        note = f"of the {_count_noun(len(samples), 'sample')} below"
    if not shares:
        return None
    first = format_percent(shares[0]) if len(shares) > 1 else ""
    return Headline(label, first, format_percent(shares[-1]), note)


def _layout(rows: Sequence[Row], recipe: dict) -> tuple[str, str]:
    """What the run said its layout is, else what the recipe asks for; and the number of ranks."""
    world_size = _latest(rows, "world_size")
    note = _count_noun(int(world_size), "rank") if world_size else ""
    said = _latest(rows, "layout")
    if said:
        return str(said), note
    sizes = recipe.get("parallel")
    if not isinstance(sizes, dict):
        return "", note
    parts = [f"{short}{sizes[key]}" for short, key in _LAYOUT_KEYS if sizes.get(key, 1) not in (0, 1)]
    return " × ".join(parts) or "one rank per replica", note


def _event_line(row: Row, start_s: float) -> EventLine:
    time_s = number(row, "time")
    known = math.isfinite(time_s)
    hidden = {"kind", "step", "time", "event", "text", "environment"}
    fields = [f"{name.replace('_', ' ')} {_show(value)}" for name, value in row.items() if name not in hidden]
    return EventLine(
        step=f"{row['step']:,}",
        elapsed=format_clock(time_s - start_s) if known else "",
        time=_format_time(time_s) if known else "",
        kind="evaluation" if row["kind"] == "eval" else str(row.get("event", row["kind"])),
        text=" · ".join([str(row["text"]), *fields] if row.get("text") else fields),
    )


def _format_time(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def _show(value: Any) -> str:
    return format_number(value) if isinstance(value, float) else str(value)
