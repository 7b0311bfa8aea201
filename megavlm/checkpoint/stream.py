"""What conversion works with: tensors of a native checkpoint one by one, and a budget of bytes in flight.

A native checkpoint is layout-independent: its tensors lie under their native names, whole or in parts. No model and no
process group is needed.
"""

import contextlib
import io
import math
import os
import queue
import struct
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megavlm.checkpoint.safetensors_writer import TensorSpec

NUM_THREADS = 2
BUDGET_BYTES = 128 * 2**20
"""Tensors in flight beside the largest one; a tensor that is larger goes alone."""


@dataclass(frozen=True)
class RowsInFile:
    """Rows of a tensor whose bytes lie behind each other.

    Attributes:
        path: of the file.
        offset: of the first byte in it.
        num_rows: how many; a tensor without dimensions is one.
    """

    path: Path
    offset: int
    num_rows: int


class NativeReader:
    """Whole tensors of a native checkpoint by their native names; may be read by several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        metadata = FileSystemReader(folder).read_metadata()
        found = metadata.state_dict_metadata
        self.specs: dict[str, TensorSpec] = {
            name: TensorSpec(tuple(entry.size), entry.properties.dtype)
            for name, entry in found.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._chunks: dict[str, list[tuple[Sequence[int], Any]]] = {}
        for index, info in metadata.storage_data.items():
            self._chunks.setdefault(index.fqn, []).append((index.offset or (), info))

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor."""
        spec, chunks = self.specs[name], self._chunks[name]
        if len(chunks) == 1:
            return self._load(chunks[0][1])
        whole = torch.empty(spec.shape, dtype=spec.dtype)
        for offsets, info in chunks:
            part = self._load(info)
            target = whole
            for dimension, (start, size) in enumerate(zip(offsets, part.shape, strict=True)):
                target = target.narrow(dimension, start, size)
            target.copy_(part)
        return whole

    def _load(self, info: Any) -> torch.Tensor:
        with self._archive(info) as archive:
            tensor: torch.Tensor = torch.load(archive, map_location="cpu", weights_only=True)
            return tensor

    @contextlib.contextmanager
    def _archive(self, info: Any) -> Iterator[io.BufferedReader]:
        """What torch.save has written of a part."""
        with (self.folder / info.relative_path).open("rb") as file:
            yield io.BufferedReader(_Slice(file, info.offset, info.length))

    def rows(self, name: str) -> list[RowsInFile] | None:
        """Where a tensor's bytes lie, in its order; None if they lie in another order, or are cut within rows."""
        spec, found = self.specs[name], []
        position = 0
        for offsets, info in sorted(self._chunks[name], key=lambda chunk: tuple(chunk[0])):
            with self._archive(info) as archive:
                shape, start = _contiguous_bytes(archive)
            if start is None or shape[1:] != spec.shape[1:] or any(offsets[1:]) or sum(offsets[:1]) != position:
                return None
            position += math.prod(shape[:1])
            found.append(RowsInFile(self.folder / info.relative_path, info.offset + start, math.prod(shape[:1])))
        return found if position == math.prod(spec.shape[:1]) else None


def _contiguous_bytes(archive: io.BufferedReader) -> tuple[tuple[int, ...], int | None]:
    """Shape of the tensor that torch.save has written, and where in the archive its bytes begin.

    They lie there as they are if the tensor is contiguous and all of its storage; None otherwise.
    """
    tensor = torch.load(archive, map_location="meta", weights_only=True)
    with zipfile.ZipFile(archive) as parts:
        records = [info for info in parts.infolist() if PurePosixPath(info.filename).parent.name == "data"]
    if len(records) != 1 or records[0].file_size != tensor.nbytes or records[0].compress_type != zipfile.ZIP_STORED:
        return tuple(tensor.shape), None
    if not tensor.is_contiguous() or tensor.storage_offset():
        return tuple(tensor.shape), None
    # A zip file's local header: 30 bytes, the last four of which are the lengths of the two fields behind them.
    archive.seek(records[0].header_offset)
    name_length, extra_length = struct.unpack("<26xHH", archive.read(30))
    return tuple(tensor.shape), records[0].header_offset + 30 + name_length + extra_length


class _Slice(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._position)]
        count = os.preadv(self._file.fileno(), [view], self._start + self._position)
        self._position += count
        return count


class MemoryReader:
    """The same for tensors in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.folder = Path("memory")
        self._tensors = tensors
        self.specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor."""
        return self._tensors[name]

    def rows(self, _name: str) -> None:
        """They lie in no file."""


class Reader(Protocol):
    """Whole native tensors by name."""

    folder: Path
    specs: dict[str, TensorSpec]

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor; several threads may ask."""

    def rows(self, name: str) -> list[RowsInFile] | None:
        """Where its bytes lie, in its order; None if they must be read as a tensor."""


def run_within_budget(jobs: Iterable[tuple[int, Callable[[], None]]], num_threads: int) -> None:
    """Run jobs in threads, as many at once as their bytes allow; the first failure is raised, the rest is not begun.

    Args:
        jobs: bytes that each holds while it runs, and what to call.
        num_threads: at most so many at once.
    """
    budget = _Budget()

    def run(job: Callable[[], None], num_bytes: int) -> None:
        try:
            if budget.failures.empty():
                job()
        except BaseException as error:  # handed over to the thread that waits, and raised there
            budget.failures.put(error)
        finally:
            budget.give(num_bytes)

    with ThreadPoolExecutor(num_threads) as pool:
        for num_bytes, job in jobs:
            budget.take(num_bytes)
            if not budget.failures.empty():
                break
            pool.submit(run, job, num_bytes)
    if not budget.failures.empty():
        raise budget.failures.get()


class _Budget:
    """Bytes that may be in flight; what is larger counts as all of them."""

    def __init__(self) -> None:
        self._free = BUDGET_BYTES
        self._changed = threading.Condition()
        self.failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def take(self, num_bytes: int) -> None:
        size = min(num_bytes, BUDGET_BYTES)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size

    def give(self, num_bytes: int) -> None:
        with self._changed:
            self._free += min(num_bytes, BUDGET_BYTES)
            self._changed.notify()
