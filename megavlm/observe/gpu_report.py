"""What `examples/gpu_check.sh` found out on a machine's GPUs: a JSON file for programs, a page for people."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megavlm import __version__
from megavlm.errors import use_error
from megavlm.observe.files import replace_text
from megavlm.observe.report_html import render

JSON_NAME = "gpu_report.json"
HTML_NAME = "gpu_report.html"
Outcome = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Figure:
    """A measured number and the most that it may be (None: it is only reported)."""

    name: str
    value: float
    limit: float | None = None


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        section: what kind it is of: parity, layouts, backends, throughput.
        name: what was checked.
        outcome: of it.
        reason: why it was skipped, or how it failed; empty when it passed.
        figures: that it measured.
    """

    section: str
    name: str
    outcome: Outcome
    reason: str = ""
    figures: tuple[Figure, ...] = ()


@dataclass(frozen=True)
class Throughput:
    """How fast training was.

    Attributes:
        name: backend, precision and layout.
        num_gpus: that it ran on.
        tokens_per_s: real tokens, those of images included, over all GPUs.
        images_per_s: over all GPUs.
        step_s: median time of a step.
        mfu: FLOPs of the model's matrix products (forward and twice that for backward) over the peak of the GPUs in
            bf16; None where the peak is not known.
    """

    name: str
    num_gpus: int
    tokens_per_s: float
    images_per_s: float
    step_s: float
    mfu: float | None


@dataclass(frozen=True)
class GpuReport:
    """Everything.

    Attributes:
        machine: facts as text: GPUs, versions.
        no_gpu: why nothing could run; empty where there is a GPU.
        checks: in the order in which they ran.
        throughput: rows of the table.
        written: date and time.
    """

    machine: Mapping[str, str]
    no_gpu: str = ""
    checks: tuple[Check, ...] = ()
    throughput: tuple[Throughput, ...] = ()
    written: str = ""
    version: str = field(default=__version__)

    def count(self, outcome: Outcome) -> int:
        """Checks that came out so."""
        return sum(check.outcome == outcome for check in self.checks)

    @property
    def sections(self) -> dict[str, list[Check]]:
        """Checks by their section."""
        found: dict[str, list[Check]] = {}
        for check in self.checks:
            found.setdefault(check.section, []).append(check)
        return found


def write_gpu_report(report: GpuReport, folder: Path) -> tuple[Path, Path]:
    """Write both files into a folder, which is made if need be; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n"
    page = render("gpu_report.html.j2", report=report)
    return replace_text(folder / JSON_NAME, text), replace_text(folder / HTML_NAME, page)


def read_gpu_report(path: Path) -> GpuReport:
    """Read gpu_report.json.

    Raises:
        UseError: it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        checks = tuple(
            Check(**{**check, "figures": tuple(Figure(**figure) for figure in check["figures"])})
            for check in content["checks"]
        )
        return GpuReport(**{**content, "checks": checks, "throughput": _rows(content["throughput"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise use_error(str(path), str(error), "what examples/gpu_check.sh writes", "run it again") from error


def _rows(rows: Iterable[Mapping[str, Any]]) -> tuple[Throughput, ...]:
    return tuple(Throughput(**row) for row in rows)
