"""Native checkpoints on their way to the disk: written under a temporary name, renamed when they are complete.

A step folder holds Megatron-Core's `torch_dist` files, the resolved recipe, and `manifest.json` (every file's size and
hash), written last.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint.api import CheckpointException

from megavlm.checkpoint.manifest import MANIFEST, entry_of
from megavlm.checkpoint.watchdog import time_limit
from megavlm.errors import RunError
from megavlm.platform import megatron_compat

LATEST = "latest"
EVALUATION = "evaluation.json"
_STEP = re.compile(r"^step_(\d{8})$")


def step_folder(root: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return root / f"step_{step:08d}"


def complete_checkpoints(root: Path) -> list[Path]:
    """Step folders with a manifest, oldest first."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if _STEP.match(path.name) and (path / MANIFEST).is_file())


@dataclass(frozen=True)
class Keep:
    """Which complete checkpoints stay.

    Attributes:
        last: so many of the newest; 0: all.
        every_steps: those of steps that are a multiple of this, too; 0: no such ones.
        best: so many with the least evaluation loss, too.
    """

    last: int
    every_steps: int = 0
    best: int = 0

    def superfluous(self, folders: Sequence[Path]) -> list[Path]:
        """Step folders to remove, of all there are, oldest first."""
        if not self.last:
            return []
        losses = [(loss, folder) for folder in folders if (loss := evaluation_loss(folder)) is not None]
        best = {folder for _, folder in sorted(losses)[: self.best]}
        return [
            folder
            for folder in folders[: -self.last]
            if folder not in best
            and (not self.every_steps or int(folder.name.removeprefix("step_")) % self.every_steps)
        ]


def evaluation_loss(folder: Path) -> float | None:
    """Loss on held-out rows of a checkpoint's weights, where they were evaluated."""
    path = folder / EVALUATION
    return float(json.loads(path.read_text(encoding="utf-8"))["loss"]) if path.is_file() else None


class PendingSave:
    """A checkpoint whose files are being written, by a thread, from a copy of the state; `finish` completes it."""

    def __init__(
        self,
        root: Path,
        step: int,
        state: dict[str, Any],
        texts: Mapping[str, str],
        timeout_s: int,
        keep: Keep,
        live: frozenset[int],
    ) -> None:
        """Plan, copy, and start to write; see `begin_save`."""
        self.root, self.step, self.final = root, step, step_folder(root, step)
        self.started_s = time.monotonic()
        self._temporary = root / f".writing_{self.final.name}"
        self._texts, self._timeout_s, self._keep = texts, timeout_s, keep
        self._hashes: dict[str, dict[str, Any]] = {}
        self._problem = ""
        with self._limited():
            if dist.get_rank() == 0:
                shutil.rmtree(self._temporary, ignore_errors=True)
                self._temporary.mkdir(parents=True)
            dist.barrier()
            request = megatron_compat.begin_save(state, self._temporary)
            self._finalize: list[Callable[[], None]] = request.finalize_fns
            buckets: Any = []
            write: Callable[[], None] = _nothing
            if request.async_fn is not None:  # else this rank has nothing to write
                rank, buckets, results = request.async_fn_args
                if not all(tensor.is_cpu for bucket in buckets for _, tensor in bucket[2][1]):
                    buckets = request.preload_fn()
                elif live:
                    buckets = [_copied(bucket, live) for bucket in buckets]
                write = functools.partial(request.async_fn, rank, buckets, results)
            else:  # this rank has nothing to write
                write = _nothing
        self._thread = threading.Thread(
            target=self._write, args=(write, [Path(one[0]) for one in buckets]), daemon=True
        )
        self._thread.start()

    @property
    def is_written(self) -> bool:
        """Whether this rank's files are; also after a failure, which `finish` raises."""
        return not self._thread.is_alive()

    @property
    def is_late(self) -> bool:
        """Whether it takes longer than it may."""
        return time.monotonic() - self.started_s > self._timeout_s

    def finish(self) -> Path:
        """Wait for the files, and put the checkpoint in its place; every rank calls this.

        Raises:
            RunError: writing failed; what was written is removed.
        """
        with self._limited():
            self._thread.join()
            for finalize in self._finalize:
                finalize()
            problems: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(problems, self._problem)
            found = next((one for one in problems if one), "")
            if found:
                raise OSError(found)
            if dist.get_rank() == 0:
                for name, text in self._texts.items():
                    (self._temporary / name).write_text(text, encoding="utf-8")
            dist.barrier()
            _finish(self.root, self._temporary, self.final, self._keep, self._hashes)
            dist.barrier()
        return self.final

    def _write(self, write: Callable[[], None], files: Sequence[Path]) -> None:
        """In the thread: write, then hash what was written. A failure of writing itself is in the results."""
        try:
            write()
            for path in files:
                self._hashes[path.name] = entry_of(path)
        except (OSError, RuntimeError) as error:  # raised in `finish`, on every rank
            self._problem = last_line(error)

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        """A part of the save: within the time limit, its errors turned into one line."""
        try:
            with time_limit(self._timeout_s, f"saving {self.final}"):
                yield
        except (OSError, RuntimeError, CheckpointingException, CheckpointException) as error:
            if dist.get_rank() == 0:
                shutil.rmtree(self._temporary, ignore_errors=True)
            raise RunError(
                f"step {self.step}: cannot save {self.final} ({last_line(error)}); "
                "earlier checkpoints are untouched; is the disk full?"
            ) from error


def _nothing() -> None:
    pass


def _copied(bucket: Any, live: frozenset[int]) -> Any:
    """A bucket (path, name, (bytes, tensors)) of Megatron-Core's writer with copies in place of tensors in use."""
    path, name, (raw, tensors) = bucket
    copies = [
        (item, tensor.clone() if tensor.untyped_storage().data_ptr() in live else tensor) for item, tensor in tensors
    ]
    return path, name, (raw, copies)


def begin_save(
    root: Path,
    step: int,
    state: dict[str, Any],
    texts: Mapping[str, str],
    timeout_s: int,
    keep: Keep,
    live: frozenset[int] = frozenset(),
) -> PendingSave:
    """Begin to write a checkpoint, which will be complete under its name, or not there.

    Args:
        root: the run's checkpoint folder.
        step: optimizer steps done.
        state: sharded state of this rank.
        texts: further files by name (the recipe), written by rank 0.
        timeout_s: the process ends with a message when the save takes longer.
        keep: which older ones stay.
        live: addresses of storages that training will change while they are written: of what lies in them a copy is
            written. What was gathered for the save is in use by nobody, and is not copied again.

    Raises:
        RunError: it cannot be begun.
    """
    return PendingSave(root, step, state, texts, timeout_s, keep, live)


def write_weights(root: Path, common: Mapping[str, Any], write: Callable[[Path], Mapping[str, Any]]) -> Path:
    """A checkpoint of step 0 with weights alone, in one process and without a process group.

    Args:
        root: an existing, empty directory.
        common: what is not sharded.
        write: puts the sharded files into a folder, and returns the manifest's entries of those that it has hashed.
    """
    final = step_folder(root, 0)
    temporary = root / f".writing_{final.name}"
    temporary.mkdir()
    known = write(temporary)
    torch.save({"common": dict(common)}, temporary / COMMON_STATE_FNAME)
    save_config(CheckpointingConfig("torch_dist", 1), str(temporary))
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    manifest = {path.name: known[path.name] if path.name in known else entry_of(path) for path in files}
    _publish(root, temporary, final, manifest)
    return final


def _finish(root: Path, temporary: Path, final: Path, keep: Keep, mine: Mapping[str, Any]) -> None:
    """Manifest, rename, pointer, clean-up; every rank has hashed what it wrote, rank 0 does the few small files."""
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, dict(mine))
    if dist.get_rank() != 0:
        return
    manifest = {name: entry for part in everyones for name, entry in part.items()}
    for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
        name = str(path.relative_to(temporary))
        if name not in manifest:
            manifest[name] = entry_of(path)
    _publish(root, temporary, final, manifest)
    for old in keep.superfluous(complete_checkpoints(root)):
        shutil.rmtree(old)


def _publish(root: Path, temporary: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    """Manifest, rename, pointer."""
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
    replaced = root / f".replaced_{final.name}"
    if final.exists():  # an earlier save of the same step stays until the new one is in its place
        os.replace(final, replaced)
    os.replace(temporary, final)
    shutil.rmtree(replaced, ignore_errors=True)
    pointer = root / f".{LATEST}"
    pointer.write_text(final.name + "\n", encoding="utf-8")
    os.replace(pointer, root / LATEST)


def last_line(error: BaseException) -> str:
    """What went wrong; torch's CheckpointException (no Exception) holds whole tracebacks of other ranks."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
