"""Conversion tensor by tensor, without a model and without a process group.

A native checkpoint is layout-independent: its tensors lie under their native names, whole or in parts, so that each
entry of a family's weight map is read, reordered and written on its own. Several threads do so at once, within a budget
of bytes in flight.
"""

import functools
import io
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megavlm.checkpoint.hf_io import INDEX, SINGLE, HFDirectory, index_text
from megavlm.checkpoint.safetensors_writer import SafetensorsWriter, TensorSpec
from megavlm.checkpoint.weight_formats import WeightFormat
from megavlm.errors import use_error
from megavlm.models.weight_map import Entry

NUM_THREADS = 2
BUDGET_BYTES = 128 * 2**20
"""Tensors in flight beside the largest one; a tensor that is larger goes alone."""


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
        with (self.folder / info.relative_path).open("rb") as file:
            part = io.BufferedReader(_Slice(file, info.offset, info.length))
            tensor: torch.Tensor = torch.load(part, map_location="cpu", weights_only=True)
            return tensor


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


@dataclass(frozen=True)
class OutputFile:
    """A file to write: its name, and its tensors in order."""

    name: str
    specs: Mapping[str, TensorSpec]


class Reader(Protocol):
    """Whole native tensors by name."""

    folder: Path
    specs: dict[str, TensorSpec]

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor; several threads may ask."""


def export_stream(
    reader: Reader,
    directory: HFDirectory,
    out_dir: Path,
    weight_format: WeightFormat,
    max_shard_bytes: int = 5 * 2**30,
    num_threads: int = NUM_THREADS,
) -> None:
    """Write a native checkpoint's weights as safetensors files, with an index where there are several.

    Args:
        reader: of the checkpoint.
        directory: says what the model is.
        out_dir: an existing, empty directory.
        weight_format: what becomes of each.
        max_shard_bytes: a new file is begun before this size is passed.
        num_threads: that read, convert and write.

    Raises:
        UseError: the checkpoint lacks a tensor, or has it in another shape than the directory's config says.
    """
    specs: dict[str, TensorSpec] = {}
    for name, shape in exported_shapes(reader, directory).items():
        specs |= weight_format.specs(name, shape)
    for name in directory.carried:
        specs |= weight_format.specs(name, directory.spec(name).shape)
    files = list(_files(specs, max_shard_bytes))
    writers = {file.name: SafetensorsWriter(out_dir / file.name, file.specs) for file in files}
    writer_of = {name: writers[file.name] for file in files for name in file.specs}

    def convert(entry: Entry) -> None:
        whole = reader.read(entry.native)
        for name, part in zip(entry.names, entry.to_hf(whole), strict=True):
            write(name, part)

    def write(name: str, tensor: torch.Tensor) -> None:
        for written, part in weight_format.tensors(name, tensor).items():
            writer_of[written].write(written, part)

    def carry(name: str) -> None:
        write(name, directory.read(name))

    try:
        jobs = [
            (reader.specs[entry.native].num_bytes, functools.partial(convert, entry)) for entry in directory.entries
        ]
        jobs += [(directory.spec(name).num_bytes, functools.partial(carry, name)) for name in directory.carried]
        run_within_budget(jobs, num_threads)
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    for writer in writers.values():
        writer.close()
    if len(files) > 1:
        (out_dir / INDEX).write_text(index_text([(file.name, file.specs) for file in files]), encoding="utf-8")


def exported_shapes(reader: Reader, directory: HFDirectory) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors by their Hugging Face names.

    Raises:
        UseError: the checkpoint lacks one.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in directory.entries:
        if entry.native not in reader.specs:
            raise use_error(
                str(reader.folder),
                f"no tensor {entry.native}",
                f"a checkpoint of the model in {directory.path}",
                "give --hf-dir the directory that training started from",
            )
        parts = entry.to_hf(torch.empty(reader.specs[entry.native].shape, device="meta"))
        for name, part in zip(entry.names, parts, strict=True):
            shapes[name] = tuple(part.shape)
    return shapes


def _files(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> Iterator[OutputFile]:
    """Tensors in their order, in as few files as the limit allows."""
    shards: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if size and size + spec.num_bytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.num_bytes
    if len(shards) == 1:
        yield OutputFile(SINGLE, shards[0])
        return
    for number, shard in enumerate(shards, 1):
        yield OutputFile(f"model-{number:05d}-of-{len(shards):05d}.safetensors", shard)


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
