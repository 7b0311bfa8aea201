"""A native checkpoint's weights to safetensors files, without a model and without a process group.

Each entry of a family's weight map is read, reordered and written on its own, by threads within a budget of bytes.
Where that only puts whole rows into another order, and their type stays, their bytes go from file to file through a
small buffer, which stays in a core's cache: no tensor is made, and no new page of memory is touched.
"""

import functools
import os
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megavlm.checkpoint.hf_io import INDEX, MASK_FILE, SINGLE, HFDirectory, index_text
from megavlm.checkpoint.manifest import PIECE_BYTES
from megavlm.checkpoint.safetensors_writer import SafetensorsWriter, TensorSpec
from megavlm.checkpoint.stream import NUM_THREADS, Reader, RowsInFile, run_within_budget
from megavlm.checkpoint.weight_formats import WeightFormat
from megavlm.errors import use_error
from megavlm.models.mask_head import NAMES as MASK_NAMES
from megavlm.models.weight_map import Entry, row_runs


@dataclass(frozen=True)
class OutputFile:
    """A file to write: its name, and its tensors in order."""

    name: str
    specs: Mapping[str, TensorSpec]


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
    beside = {name: specs.pop(name) for name in MASK_NAMES if name in specs}
    files = list(_files(specs, max_shard_bytes))
    num_files = len(files)
    if beside:
        (out_dir / MASK_FILE).parent.mkdir()
        files.append(OutputFile(MASK_FILE, beside))
    all_specs = specs | beside
    writers = {file.name: SafetensorsWriter(out_dir / file.name, file.specs) for file in files}
    writer_of = {name: writers[file.name] for file in files for name in file.specs}

    def convert(entry: Entry) -> None:
        whole = reader.read(entry.native)
        for name, part in zip(entry.names, entry.to_hf(whole), strict=True):
            write(name, part)

    def write(name: str, tensor: torch.Tensor) -> None:
        for written, part in weight_format.tensors(name, tensor).items():
            writer_of[written].write(written, part)

    buffers: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    for _ in range(num_threads):
        buffers.put(memoryview(bytearray(PIECE_BYTES)))

    def copy(entry: Entry, rows: list[RowsInFile]) -> None:
        buffer = buffers.get()
        try:
            _copy_rows(entry, rows, {name: (writer_of[name], all_specs[name]) for name in entry.names}, buffer)
        finally:
            buffers.put(buffer)

    try:
        jobs: list[tuple[int, Callable[[], None]]] = []
        for entry in directory.entries:
            spec = reader.specs[entry.native]
            as_they_are = entry.moves_rows and all(weight_format.keeps(name, spec.dtype) for name in entry.names)
            rows = reader.rows(entry.native) if as_they_are else None
            if rows is None:
                jobs.append((spec.num_bytes, functools.partial(convert, entry)))
            else:
                jobs.append((PIECE_BYTES, functools.partial(copy, entry, rows)))
        for name in directory.carried:
            jobs.append((directory.spec(name).num_bytes, functools.partial(_carry, directory, name, write)))
        run_within_budget(jobs, num_threads)
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    for writer in writers.values():
        writer.close()
    if num_files > 1:
        listed = [(file.name, file.specs) for file in files[:num_files]]
        (out_dir / INDEX).write_text(index_text(listed), encoding="utf-8")


def _carry(directory: HFDirectory, name: str, write: Callable[[str, torch.Tensor], None]) -> None:
    """Write a tensor of the directory that the model has no part in."""
    write(name, directory.read(name))


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


def _copy_rows(
    entry: Entry,
    rows: Sequence[RowsInFile],
    targets: Mapping[str, tuple[SafetensorsWriter, TensorSpec]],
    buffer: memoryview,
) -> None:
    """Write the Hugging Face tensors of an entry that moves rows, a buffer full at a time."""
    source = _Bytes(rows, sum(spec.num_bytes for _, spec in targets.values()))
    for run in row_runs(entry, [spec.shape for _, spec in targets.values()]):
        writer, spec = targets[run.name]
        row_bytes = spec.num_bytes // (spec.shape[0] if spec.shape else 1)
        position, end = run.start * row_bytes, (run.start + run.num_rows) * row_bytes
        while position < end:
            piece = source.read(buffer[: min(end - position, len(buffer))])
            writer.write_bytes(run.name, position, piece)
            position += len(piece)


class _Bytes:
    """The bytes of a tensor from front to back."""

    def __init__(self, rows: Sequence[RowsInFile], num_bytes: int) -> None:
        self._rows, self._row_bytes = list(rows), num_bytes // max(sum(part.num_rows for part in rows), 1)
        self._part, self._position = 0, 0

    def read(self, buffer: memoryview) -> memoryview:
        """As many of the next bytes as there are of them in one file, at most a buffer full."""
        part = self._rows[self._part]
        end = part.num_rows * self._row_bytes
        size = min(len(buffer), end - self._position)
        with part.path.open("rb", buffering=0) as file:
            count = os.preadv(file.fileno(), [buffer[:size]], part.offset + self._position)
        if not count:
            raise OSError(f"{part.path} ends before its tensors do")
        self._position += count
        while self._part < len(self._rows) and self._position == self._rows[self._part].num_rows * self._row_bytes:
            self._part, self._position = self._part + 1, 0
        return buffer[:count]
