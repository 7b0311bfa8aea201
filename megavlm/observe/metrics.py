"""The log of a run: one JSON line per event in `metrics.jsonl`, and the same numbers for TensorBoard.

Every row has `kind`, `step` and `time` (seconds since 1970). Kinds:
    train  the fields of `StepMetrics`
    eval   `loss` and whatever else an evaluation measured, e.g. `exact_match` in 0..1
    event  `event` (start, resume, save, end, ...), `text` for people, and any further fields
The lines are strict JSON: a value that is not finite is written as "NaN", "Infinity" or "-Infinity" and read back as
the float.
"""

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from megavlm.errors import RunError, UseError, use_error

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LOG_NAME = "metrics.jsonl"
ABANDONED_NAME = "metrics.abandoned.jsonl"
TENSORBOARD_NAME = "tensorboard"
KEEP_ALL = sys.maxsize
"""As `resume_step`: add to the log of a finished run, whatever its last step was."""

_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class StepMetrics:
    """What one log row says about training.

    Attributes:
        step: optimizer steps done, from 1.
        loss: mean loss per supervised token of this step's global batch.
        num_tokens: supervised tokens of this step's global batch (a float: weights may be fractions).
        grad_norm: global gradient norm before clipping.
        grad_norms: the same per component (vision, projector, language), of those that learn.
        learning_rates: current learning rate per component.
        tokens_per_second: all real tokens, images included, over all ranks; mean since the last row.
        images_per_second: images over all ranks; mean since the last row.
        step_s: wall seconds per step; mean since the last row.
        consumed_samples: samples seen since training began, earlier attempts included.
        extra: further numbers of the stage, e.g. `accuracy`; logged and shown in TensorBoard, never drawn.
    """

    step: int
    loss: float
    num_tokens: float
    grad_norm: float
    grad_norms: dict[str, float]
    learning_rates: dict[str, float]
    tokens_per_second: float
    images_per_second: float
    step_s: float
    consumed_samples: int
    extra: dict[str, float] = field(default_factory=dict)


class RunLog:
    """The log of one run folder, open for writing. Made on one rank only.

    A file never has a training step twice: on reopening, the rows that the coming attempt will write again are moved to
    `metrics.abandoned.jsonl`, and a line torn by a crash is dropped.

    Args:
        run_dir: the run folder; made if it is not there.
        tensorboard: also write `run_dir/tensorboard`.
        resume_step: the step that the run goes on from: rows up to it stay. None: a new run, no row stays.
            `KEEP_ALL`: every row stays.

    Raises:
        UseError: tensorboard is asked for and not installed, or the log there is damaged before its last line.
        RunError: the folder cannot be written.
    """

    def __init__(self, run_dir: str | Path, tensorboard: bool, resume_step: int | None = None) -> None:
        self.path = Path(run_dir) / LOG_NAME
        self._writer: SummaryWriter | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._last_step = _abandon_rows(self.path, -1 if resume_step is None else resume_step)
            self._file: TextIO = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise RunError(f"cannot write the log {self.path}: {error}") from error
        if tensorboard:
            self._writer = _open_tensorboard(self.path.parent / TENSORBOARD_NAME, resume_step)

    def log_train(self, metrics: StepMetrics) -> None:
        """Write one training row; steps only go up."""
        assert metrics.step > self._last_step, f"step {metrics.step} logged after step {self._last_step}"
        self._last_step = metrics.step
        self._write({"kind": "train", "time": time.time(), **dataclasses.asdict(metrics)})
        if self._writer is None:
            return
        scalars = {
            "train/loss": metrics.loss,
            "train/num_tokens": metrics.num_tokens,
            "train/consumed_samples": float(metrics.consumed_samples),
            "grad_norm/total": metrics.grad_norm,
            "throughput/tokens_per_second": metrics.tokens_per_second,
            "throughput/images_per_second": metrics.images_per_second,
            "throughput/step_s": metrics.step_s,
        }
        scalars |= {f"grad_norm/{name}": value for name, value in metrics.grad_norms.items()}
        scalars |= {f"learning_rate/{name}": value for name, value in metrics.learning_rates.items()}
        scalars |= {f"extra/{name}": value for name, value in metrics.extra.items()}
        self._write_scalars(metrics.step, scalars)

    def log_eval(self, step: int, values: dict[str, float]) -> None:
        """Write one evaluation of the weights after `step` steps (0: before training), e.g. `{"loss": 0.41}`."""
        self._write({"kind": "eval", "time": time.time(), "step": step, **values})
        self._write_scalars(step, {f"eval/{name}": value for name, value in values.items()})

    def log_event(self, step: int, event: str, text: str = "", **fields: Any) -> None:
        """Write that something happened; further fields are any JSON.

        The report reads these from `start` and `resume`: `total_steps`, `layout` (e.g. "TP2 x PP2"), `world_size`,
        `environment` (see `environment.collect_environment`).
        """
        self._write({"kind": "event", "time": time.time(), "step": step, "event": event, "text": text, **fields})

    def close(self) -> None:
        """Close both logs; closing twice is fine."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, row: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(_encode(row), ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(f"cannot write the log {self.path} at step {row['step']}: {error}") from error

    def _write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        if self._writer is not None:
            for tag, value in scalars.items():
                self._writer.add_scalar(tag, value, step)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a log in the order they were written; a last line torn by a crash is left out.

    Raises:
        UseError: there is no such file, or a line before the last one is not a row.
    """
    return [row for row, _ in _read_lines(Path(path))]


def _read_lines(path: Path) -> list[tuple[dict[str, Any], str]]:
    """Every whole row with its text."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise use_error(
            str(path), error.strerror, "the log of a run", "give the folder of a run that started"
        ) from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    rows = []
    for number, line in numbered:
        try:
            rows.append((_parse_row(line), line.decode()))
        except ValueError as error:
            if number == numbered[-1][0]:
                break
            raise _damaged_line(path, number, line, error) from None
    return rows


def _damaged_line(path: Path, number: int, line: bytes, error: ValueError) -> UseError:
    shown = line[:60].decode(errors="replace")
    return use_error(f"{path} line {number}", f"{shown!r} ({error})", "one JSON row per line", "remove that line")


def _parse_row(line: bytes) -> dict[str, Any]:
    row = json.loads(line.decode())
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str) or not isinstance(row.get("step"), int):
        raise ValueError("no kind and step")
    return _decode(row)


def _encode(value: Any) -> Any:
    """`value` with floats that JSON has no word for replaced by their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, str):
        return _NONFINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value


def _abandon_rows(path: Path, resume_step: int) -> int:
    """Keep the rows up to `resume_step`, move later ones aside; returns the last training step that is kept, or -1."""
    if not path.exists():
        return -1
    lines = _read_lines(path)
    kept = [(row, text) for row, text in lines if row["step"] <= resume_step]
    dropped = [text for row, text in lines if row["step"] > resume_step]
    if dropped:
        with path.with_name(ABANDONED_NAME).open("a", encoding="utf-8") as abandoned:
            abandoned.write(_join_lines(dropped))
    # Written anew even when no row goes: the last line may be torn, or whole without its newline.
    fresh = path.with_name(f".{LOG_NAME}.tmp")
    fresh.write_text(_join_lines(text for _, text in kept), encoding="utf-8")
    os.replace(fresh, path)
    return max((row["step"] for row, _ in kept if row["kind"] == "train"), default=-1)


def _join_lines(texts: Iterable[str]) -> str:
    return "".join(f"{text}\n" for text in texts)


def _open_tensorboard(folder: Path, resume_step: int | None) -> "SummaryWriter":
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise use_error(
            "observe.tensorboard",
            f"true, and {error}",
            "the tensorboard package",
            "`pip install tensorboard`, or observe.tensorboard=false",
        ) from None
    if resume_step == KEEP_ALL:
        return SummaryWriter(str(folder))
    # TensorBoard hides what earlier attempts logged from this step on.
    return SummaryWriter(str(folder), purge_step=0 if resume_step is None else resume_step + 1)
