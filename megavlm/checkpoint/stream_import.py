"""Hugging Face weights to the sharded files of a native checkpoint, a megabyte at a time.

Most native parameters are whole rows of Hugging Face tensors in another order. Their bytes go from file to file through
a small buffer, which stays in a core's cache while it is read, hashed and written: no tensor is made, and no new page
of memory is touched. Only what a weight map changes within rows is made as a tensor first.
"""

import contextlib
import functools
import math
import os
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult

from megavlm.checkpoint.hf_io import HFDirectory
from megavlm.checkpoint.manifest import PIECE_BYTES, FileHash
from megavlm.checkpoint.safetensors_writer import TensorSpec, write_all
from megavlm.checkpoint.stream import NUM_THREADS, run_within_budget
from megavlm.models.weight_map import Entry, row_runs


def import_stream(directory: HFDirectory, folder: Path, num_threads: int = NUM_THREADS) -> dict[str, dict[str, Any]]:
    """Write a directory's weights as the sharded files of a native checkpoint, in the type that they are stored in.

    Args:
        directory: checked already.
        folder: an existing, empty directory.
        num_threads: that read, convert and write.

    Returns:
        The manifest's entries of the files with weights: hashed while they are written, they need not be read again.
    """
    entries = {entry.native: entry for entry in directory.entries}
    state: dict[str, torch.Tensor] = {}
    for entry in directory.entries:
        specs = [directory.spec(name) for name in entry.names]
        state[entry.native] = entry.to_native(
            [torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in specs]
        )
    planner = DefaultSavePlanner()
    writer = FileSystemWriter(folder)
    planner.set_up_planner(state, is_coordinator=True)
    writer.set_up_storage_writer(is_coordinator=True)
    plans, metadata = planner.create_global_plan([planner.create_local_plan()])
    (plan,) = writer.prepare_global_plan([writer.prepare_local_plan(planner.finish_plan(plans[0]))])
    results: list[WriteResult] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_crc32())
        files = [stack.enter_context(_OutputFile(folder / f"__0_{number}.distcp")) for number in range(num_threads)]
        idle: queue.SimpleQueue[_OutputFile] = queue.SimpleQueue()
        for file in files:
            idle.put(file)

        def write(name: str, index: Any) -> None:
            file = idle.get()
            try:
                place = file.write_tensor(state[name], _pieces(directory, entries[name], file.buffer))
            finally:
                idle.put(file)  # others may wait for one, also after a failure
            results.append(WriteResult(index, place.length, place))

        jobs = []
        for item in plan.items:
            name = item.index.fqn
            held = PIECE_BYTES if _is_copied(directory, entries[name]) else state[name].nbytes
            jobs.append((held, functools.partial(write, name, item.index)))
        run_within_budget(jobs, num_threads)
    writer.finish(metadata, [results])
    return {file.name: file.hash.entry for file in files}


def _is_copied(directory: HFDirectory, entry: Entry) -> bool:
    """Whether a native parameter's bytes are those of its Hugging Face tensors, in the order of their rows or another.

    Tensors of several types become one of the widest: their bytes change.
    """
    return entry.moves_rows and len({directory.spec(name).dtype for name in entry.names}) == 1


def _pieces(directory: HFDirectory, entry: Entry, buffer: memoryview) -> Iterator[memoryview]:
    """A native parameter's bytes in order, a buffer full at a time; each is used before the next is asked for."""
    if not _is_copied(directory, entry):
        data: Any = directory.read_native(entry).contiguous().reshape(-1).view(torch.uint8).numpy()
        for start in range(0, len(data), len(buffer)):
            yield memoryview(data)[start : start + len(buffer)]
        return
    specs = {name: directory.spec(name) for name in entry.names}
    filled = 0
    for run in row_runs(entry, [spec.shape for spec in specs.values()]):
        row_bytes = _row_bytes(specs[run.name])
        position, end = run.start * row_bytes, (run.start + run.num_rows) * row_bytes
        while position < end:
            size = min(end - position, len(buffer) - filled)
            directory.read_into(run.name, position, buffer[filled : filled + size])
            position, filled = position + size, filled + size
            if filled == len(buffer):
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]


def _row_bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape[1:]) * spec.dtype.itemsize


class _OutputFile:
    """A file of tensors, written from front to back and hashed on the way.

    torch.distributed.checkpoint reads files in which every tensor is an archive of its own, as torch.save writes it.
    Its FileSystemWriter would keep all tensors in memory until the file is closed.
    """

    def __init__(self, path: Path) -> None:
        self.name, self.hash, self.buffer = path.name, FileHash(), memoryview(bytearray(PIECE_BYTES))
        self._position = 0
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

    def __enter__(self) -> "_OutputFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def write_tensor(self, spec: torch.Tensor, pieces: Iterator[memoryview]) -> _StorageInfo:
        """Append an archive; returns its place.

        Args:
            spec: of the tensor's shape and type.
            pieces: its bytes.
        """
        before, after = _archive(tuple(spec.shape), spec.dtype)
        start, length = self._position, len(before) + spec.nbytes + len(after)
        # in one go: less work than page by page, and a full disk is found at once
        os.posix_fallocate(self._file, start, length)
        self._append(memoryview(before))
        for piece in pieces:
            self._append(piece)
        self._append(memoryview(after))
        assert self._position == start + length, (self._position, start, length)
        return _StorageInfo(self.name, start, length)

    def _append(self, data: memoryview) -> None:
        self.hash.update(data)
        write_all(self._file, data, self._position)
        self._position += len(data)


def _archive(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What torch.save writes before and after the bytes of a contiguous tensor, without those bytes.

    To be called within `_without_crc32`: there are no bytes yet that a check sum could be of. torch calls `skip_data` a
    prototype: a test compares what comes of it with all that torch.save writes.
    """
    recorder = _Recorder()
    with torch.serialization.skip_data():
        torch.save(torch.empty(shape, dtype=dtype), cast(IO[bytes], recorder))
    return bytes(recorder.before), bytes(recorder.after)


class _Recorder:
    """A file in memory for torch.save, which passes over the place of a tensor's bytes (`skip_data`)."""

    def __init__(self) -> None:
        self.before, self.after = bytearray(), bytearray()
        self._has_skipped = False

    def write(self, data: Any) -> int:
        """Append bytes."""
        (self.after if self._has_skipped else self.before).extend(data)
        return len(data)

    def seek(self, offset: int, whence: int) -> None:
        """Leave room for the tensor."""
        assert whence == os.SEEK_CUR and not self._has_skipped, (offset, whence)
        self._has_skipped = True

    def flush(self) -> None:
        """There is nothing to do."""


@contextlib.contextmanager
def _without_crc32() -> Iterator[None]:
    """Without check sums of each archive's parts, in all threads: the manifest has a hash of the whole file."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
