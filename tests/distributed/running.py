"""Runs of the real command line: as processes where a process is the subject, else inside the pool's workers."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from blake3 import blake3
from PIL import Image

from tests.pool import PoolKeeper

REPO_DIR = Path(__file__).resolve().parents[2]
NUM_ROWS = 12
# From the first failure to the end of the last process.
GONE_WITHIN_S = 30.0
# Of whole runs: far more than they need, for machines that do other things too.
PATIENCE_S = 300.0
_MARK = "MEGAVLM_TEST_MARK"
_AROUND = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


@dataclass(frozen=True)
class Inputs:
    """A folder with tiny models, images, `rows.jsonl` and `recipe.yaml`; nobody changes anything in it."""

    root: Path

    @property
    def recipe(self) -> str:
        """The recipe: qwen3_vl, four samples a step, three steps, rows in file order."""
        return str(self.root / "recipe.yaml")

    @property
    def rows(self) -> Path:
        """`NUM_ROWS` rows; every second one, from the first on, has an image (`images/<index>.png`)."""
        return self.root / "rows.jsonl"

    def model(self, family: str) -> Path:
        """The Hugging Face directory of a family, or of a composed model by its connector."""
        return self.root / family

    def train(self, out_dir: Path, *overrides: str) -> list[str]:
        """Words of `megavlm train` into a run folder `out_dir`/run."""
        return ["train", self.recipe, f"output_dir={out_dir}", *overrides]

    def damaged(self, out_dir: Path, change: Callable[[list[dict[str, Any]], Path], None]) -> str:
        """A copy of rows and images with a change; returns the override that trains on it."""
        rows = [json.loads(line) for line in self.rows.read_text().splitlines()]
        for row in rows:
            row["images"] = [str(self.root / image) for image in row["images"]]
        out_dir.mkdir(parents=True, exist_ok=True)
        change(rows, out_dir)
        (out_dir / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f"data.train={out_dir}/rows.jsonl"


def write_inputs(root: Path) -> Inputs:
    """Make the folder."""
    from tests.parity.composed import ComposedReference
    from tests.tiny import write_tiny_llava, write_tiny_qwen3vl, write_tiny_qwen3vl_moe
    from tests.tiny_anyres import write_tiny_llava_next, write_tiny_llava_onevision
    from tests.tiny_internvl import write_tiny_internvl
    from tests.tiny_qwen2_5_vl import write_tiny_qwen2_5_vl

    _sharpen(write_tiny_qwen3vl(root / "qwen3_vl"))
    _sharpen(write_tiny_llava(root / "llava"))
    _sharpen(write_tiny_qwen3vl_moe(root / "qwen3_vl_moe"))
    _sharpen(write_tiny_qwen2_5_vl(root / "qwen2_5_vl", seed=1))
    _sharpen(write_tiny_internvl(root / "internvl", seed=4))
    _sharpen(write_tiny_llava_next(root / "llava_next"))
    _sharpen(write_tiny_llava_onevision(root / "llava_onevision", seed=2))
    for kind in ("perceiver", "qformer", "gated_cross_attention"):
        ComposedReference(kind).write(root / kind)
    (root / "images").mkdir()
    random = np.random.RandomState(5)
    words = "a red square and the blue circle over lazy dog largest number digits".split()
    lines = []
    for index in range(NUM_ROWS):
        images = []
        if index % 2 == 0:
            height_px, width_px = random.randint(32, 90, 2)
            images = [f"images/{index}.png"]
            pixels = random.randint(0, 256, (height_px, width_px, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / images[0])
        question = "<image>" * len(images) + " ".join(random.choice(words, 4))
        turns = [{"role": "user", "content": question}]
        turns.append({"role": "assistant", "content": " ".join(random.choice(words, 5))})
        lines.append(json.dumps({"messages": turns, "images": images}))
    (root / "rows.jsonl").write_text("\n".join(lines) + "\n")
    recipe = {
        "name": "run",
        "model": {"hf_dir": str(root / "qwen3_vl")},
        "data": {"train": [str(root / "rows.jsonl")], "max_length": 512, "max_pixels": 4096, "shuffle": False},
        "train": {"train_iters": 3, "precision": "fp32", "global_batch_size": 4},
        "optimizer": {"lr": 1e-3, "lr_decay_style": "constant"},
        "observe": {"tensorboard": False, "progress": False, "report": False},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return Inputs(root)


def _sharpen(hf_dir: Path) -> None:
    """With transformers' small initial weights, answers would hardly depend on the question, and not on the image."""
    from safetensors.torch import load_file, save_file

    weights = load_file(hf_dir / "model.safetensors")
    for tensor in weights.values():
        if tensor.ndim > 1:
            tensor.mul_(4.0)
    save_file(weights, hf_dir / "model.safetensors", metadata={"format": "pt"})


class Started:
    """A command in a process of its own. Whatever it starts is found by a mark in the environment."""

    def __init__(self, command: Sequence[str], err_file: Path, **environment: str) -> None:
        self._mark = uuid.uuid4().hex
        self._err_file = err_file
        inherited = {name: value for name, value in os.environ.items() if name not in _AROUND}
        with err_file.open("wb") as err:
            self.process = subprocess.Popen(
                command,
                cwd=REPO_DIR,
                env=inherited | {_MARK: self._mark, "CUDA_VISIBLE_DEVICES": ""} | environment,
                stdin=subprocess.DEVNULL,
                stdout=err,
                stderr=err,
                start_new_session=True,
            )

    def alive(self) -> dict[int, str]:
        """Processes that live, by id, with their command lines."""
        found = {}
        needle = f"{_MARK}={self._mark}".encode()
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                # Gone meanwhile, or not ours to read. Of a zombie, environ is empty.
                with contextlib.suppress(OSError):
                    if needle in (folder / "environ").read_bytes():
                        found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def ranks(self) -> list[int]:
        """Process ids of the ranks that a launcher has started, by rank."""
        children = [pid for pid in self.alive() if _parent(pid) == self.process.pid]
        ranks = {int(_environment(pid).get("RANK", -1)): pid for pid in children}
        return [ranks[rank] for rank in sorted(ranks) if rank >= 0]

    def text(self) -> str:
        """What all of them have written so far."""
        return self._err_file.read_text(errors="replace")

    def end(self, within_s: float = PATIENCE_S) -> int:
        """Wait for the exit code, and check that no process of it is left."""
        try:
            code = self.process.wait(within_s)
            deadline = time.monotonic() + GONE_WITHIN_S
            while (left := self.alive()) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not left, f"still there: {left}\n{self.text()}"
            return code
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end within {within_s} s; {self.alive()}\n{self.text()}") from None
        finally:
            self.kill()

    def kill(self) -> None:
        """Leave nothing behind, whatever has happened."""
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        self.process.wait()

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Wait until something has happened; fails when the process ends before."""
        deadline = time.monotonic() + PATIENCE_S
        while not happened():
            assert self.process.poll() is None, f"ended too early\n{self.text()}"
            assert time.monotonic() < deadline, f"it never happened\n{self.text()}"
            time.sleep(0.02)


def _environment(pid: int) -> dict[str, str]:
    with contextlib.suppress(OSError):
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        return dict(entry.split("=", 1) for entry in entries if "=" in entry)
    return {}


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


@contextlib.contextmanager
def started(words: Sequence[str], folder: Path, prefix: Sequence[str] = (), **environment: str) -> Iterator[Started]:
    """`megavlm WORDS` as a process; killed with all it started when the block is left."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [*prefix, sys.executable, "-m", "megavlm", *words]
    process = Started(command, folder / f"{uuid.uuid4().hex}.err", **environment)
    try:
        yield process
    finally:
        process.kill()


def call(words: Sequence[str]) -> tuple[int, str, str]:
    """The command line inside a worker of the pool: exit code, standard output, standard error."""
    from megavlm.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return code, out.getvalue(), err.getvalue()


def succeed(workers: PoolKeeper, num_processes: int, words: Sequence[str]) -> tuple[str, str]:
    """The command line inside so many workers, which must end well: what rank 0 wrote to output and error."""
    results = workers(num_processes).run(call, words=list(words))
    for code, out, err in results:
        assert code == 0, out + err
    return results[0][1:]


def the_error(text: str, *parts: str, only: bool = True) -> str:
    """The one line that says what went wrong; each of `parts` must be in it.

    Args:
        text: what all ranks have written.
        parts: words that the line must contain.
        only: whether nothing else may have been written.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("megavlm: ")]
    assert len(errors) == 1, text
    assert not only or lines == errors, text
    for noise in ("Traceback", "Warning", "ChildFailedError", "terminate called"):
        assert noise not in text, text
    for part in parts:
        assert part in errors[0], f"{part!r} is not in: {errors[0]}"
    return errors[0]


def check_intact(checkpoint: Path) -> None:
    """Every file of a checkpoint is there as its manifest says, byte for byte."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert len(manifest) > 2
    for name, entry in manifest.items():
        content = (checkpoint / name).read_bytes()
        assert entry == {"bytes": len(content), "blake3": blake3(content).hexdigest()}


def checkpoints(out_dir: Path) -> list[str]:
    """What lies in the run's checkpoint folder."""
    folder = out_dir / "run" / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def log_rows(out_dir: Path) -> list[dict[str, Any]]:
    """The rows of the run's log; a line that is being written is left out."""
    log = out_dir / "run" / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(out_dir: Path) -> dict[int, float]:
    """The loss of each step; no step may be there twice."""
    rows = [row for row in log_rows(out_dir) if row["kind"] == "train"]
    by_step = {row["step"]: row["loss"] for row in rows}
    assert len(by_step) == len(rows), "a step was logged twice"
    return by_step
