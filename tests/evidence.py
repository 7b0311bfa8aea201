"""Writes down what tests measured: rows in docs/evidence/<topic>.json, and a table for readers beside it.

    record("parity", [row("qwen3_vl: logits", 3e-7, unit="largest difference", required="<= 1e-5", ...)])

Rows of a name replace the row of that name, others stay: parts of a test run, and several runs, add up to one file.
With MEGAVLM_NO_EVIDENCE=1 nothing is written.
"""

import contextlib
import datetime
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tools.update_readme import ROW_KEYS, read_rows, table

EVIDENCE_DIR = Path(__file__).resolve().parents[1] / "docs" / "evidence"

# Topic to the title and the first lines of its page.
TITLES = {
    "balance": (
        "Balance",
        "Places of the vision encoder: simulated step times on the lengths of real data sets and on a long tail (PP4 x "
        "DP8, packs of 8K tokens, costs in FLOPs, messages free), real steps of a small model on two pinned processes "
        "against the simulator; packing and spreading by cost; the planner. Written by `make bench-balance`.",
    ),
    "backends": (
        "Backends",
        "Training and resuming with `backend: te`, Megatron-Core's own wrappers over a stand-in for Transformer Engine "
        "that computes in torch on the CPU, against the torch backend. It shows that specs, arguments and names are "
        "right, and nothing of kernels. Written by the tests that measure it.",
    ),
    "checkpoint": (
        "Checkpoints",
        "Conversion tensor by tensor against a plain copy of the same bytes on the same disk; how long training stands "
        "still for an asynchronous save, against copying the state in memory. Written by "
        "`make bench-checkpoint`.",
    ),
    "data": (
        "Data",
        "Samples into packs: speed on one core, packs over their bound, padding under the alignment of layouts; "
        "training in packed rows against padded batches. Images: patches of odd images against transformers' image "
        "processors; DALI against PIL; how fast the loader is, against decoding and resizing alone on the same cores. "
        "Written by `make bench-data` and the tests that measure it.",
    ),
    "demo": (
        "Demo",
        "A tiny Qwen3-VL trained on handwriting by four CPU processes, exported, and asked by transformers about "
        "images of digits that no training row showed. Written by `make demo`.",
    ),
    "equivalence": (
        "Equivalence",
        "Every layout against one process: the same model, rows and seed. Written by the tests that measure it.",
    ),
    "equivalence-bf16": (
        "Equivalence in bf16",
        "The first step of layouts in bf16 against one process in bf16, where rounding depends on the layout; the "
        "equivalence itself is shown in fp32. Written by the tests that measure it.",
    ),
    "precision": (
        "Precision",
        "Tiny models with emulated FP8, by recipe, against the same training without. Written by the tests that "
        "measure it and by `make bench-precision`.",
    ),
    "recipes": (
        "Recipes",
        "Recipes of real size without their machines: every rank's part of the model, built on torch's meta device, "
        "and the planner's memory for full rows. Nothing of it ran on a GPU. Written by `make check-recipes`.",
    ),
    "serve": (
        "Serving",
        "Tiny random models, imported and exported again, behind vLLM's server on the CPU, against ours: greedy "
        "tokens of an image chat and their log probabilities. Written by `make test-serve`.",
    ),
    "peft": (
        "Adapters",
        "What each way of tuning holds in memory during a training step, counted, against training everything. "
        "Written by the tests that measure it; parity with the peft package is in parity.md, layouts in "
        "equivalence.md.",
    ),
    "story": (
        "Story",
        "One tiny Qwen3-VL from random weights to preferences, on two CPU processes: contrastive pretraining, text, "
        "the projector alone, LoRA, DPO. Each chapter starts from the export of the one before; held-out images show "
        "digits that no training row showed. Written by `make story`.",
    ),
    "train": (
        "Steps",
        "A training step on one CPU thread against TRL's on the same model, rows and batches, whose first losses have "
        "to agree; and against a plain loop over the same modules. Written by `make bench-train`.",
    ),
    "parity": (
        "Parity",
        "Tiny random models against transformers (eager attention), with the same weights and inputs, and mistakes "
        "made on purpose that the same comparison has to catch. Written by the tests that measure it.",
    ),
}


def row(
    name: str,
    value: float | str,
    *,
    unit: str = "",
    required: str | None = None,
    reference: str | None = None,
    reference_value: float | str | None = None,
    command: str = "make test",
) -> dict[str, Any]:
    """One row, measured here and now; figures are cut to three digits."""
    return {
        "name": name,
        "value": _three_digits(value),
        "unit": unit,
        "required": required,
        "reference": reference,
        "reference_value": _three_digits(reference_value),
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
    }


def record(topic: str, rows: Iterable[Mapping[str, Any]], evidence_dir: Path = EVIDENCE_DIR) -> None:
    """Merge rows into a topic's two files, by name.

    Args:
        topic: a key of `TITLES`.
        rows: with the keys of `row`.
        evidence_dir: where the files are.
    """
    if os.environ.get("MEGAVLM_NO_EVIDENCE") == "1":
        return
    title, introduction = TITLES[topic]
    new = [dict(one) for one in rows]
    for one in new:
        assert set(one) == set(ROW_KEYS), f"{one.get('name')}: keys {sorted(one)}, expected {sorted(ROW_KEYS)}"
    evidence_dir.mkdir(parents=True, exist_ok=True)
    path = evidence_dir / f"{topic}.json"
    with _locked(evidence_dir):
        merged = {one["name"]: one for one in read_rows(path) + new}
        # the order of the keys too: whoever made the row, the file looks the same
        ordered = [{key: merged[name][key] for key in ROW_KEYS} for name in sorted(merged)]
        _replace(path, json.dumps(ordered, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        _replace(path.with_suffix(".md"), f"# {title}\n\n{introduction}\n\n{table(ordered)}")


@functools.cache
def machine() -> str:
    """What it was measured on; no host name, user name or path."""
    packages = ("torch", "megatron-core", "transformers")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return ", ".join([f"{os.cpu_count()} cores", _cpu_model(), f"Python {platform.python_version()}", *versions])


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _three_digits(value: float | str | None) -> float | str | None:
    return float(f"{value:.3g}") if isinstance(value, float) else value


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time: the lock is on the folder itself, so that no lock file stays behind."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp makes it readable by its owner alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
