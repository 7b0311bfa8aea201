"""Write a safetensors file tensor by tensor, in any order and from several threads, without holding it in memory.

The format: 8 bytes of header length, a JSON header with every tensor's type, shape and byte range, then the bytes.
Source: the safetensors format description (huggingface/safetensors README).
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPE_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Also written, but not read: without its scales a tensor of this type means nothing.
_WRITTEN_CODES = DTYPE_CODES | {torch.float8_e4m3fn: "F8_E4M3"}
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor will be.

    Attributes:
        shape: its dimensions.
        dtype: float32, bfloat16 or float16; of what is written also float8_e4m3fn.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """One file; its header is written at once, the tensors as they come."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        """Create the file.

        Args:
            path: does not exist.
            specs: of all tensors that will be written, by name, in the order in which they lie in the file.
        """
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._starts: dict[str, int] = {}
        end = 0
        for name, spec in specs.items():
            self._starts[name] = end
            header[name] = {
                "dtype": _WRITTEN_CODES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [end, end + spec.num_bytes],
            }
            end += spec.num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._specs, self._data_start = dict(specs), 8 + len(text)
        self._left = {name: spec.num_bytes for name, spec in specs.items()}
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        write_all(self._file, memoryview(len(text).to_bytes(8, "little") + text), 0)
        # the file has its size from the beginning: a full disk is found before hours of conversion
        os.posix_fallocate(self._file, 0, self._data_start + end)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor; may be called by several threads at once, for different tensors."""
        spec = self._specs[name]
        assert tuple(tensor.shape) == spec.shape and tensor.dtype == spec.dtype, (name, tensor.shape, spec)
        if tensor.numel():
            data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            self.write_bytes(name, 0, memoryview(data))

    def write_bytes(self, name: str, start: int, data: memoryview) -> None:
        """Write some of a tensor's bytes, from its byte `start` on; each once, and a tensor's by one thread."""
        assert start >= 0 and start + len(data) <= self._specs[name].num_bytes, (name, start, len(data))
        write_all(self._file, data, self._data_start + self._starts[name] + start)
        self._left[name] -= len(data)

    def close(self) -> None:
        """Close the file; every tensor must have been written."""
        os.close(self._file)
        wrong = [name for name, num_bytes in self._left.items() if num_bytes]
        assert not wrong, f"not written whole, or twice: {sorted(wrong)[:3]}"

    def abandon(self) -> None:
        """Close the file as it is, after a failure."""
        os.close(self._file)


def write_all(file: int, data: memoryview, offset: int) -> None:
    """Write all of it at a place of a file; os.pwrite writes at most 2 GB at a time."""
    position = 0
    while position < len(data):
        position += os.pwrite(file, data[position : position + 2**30], offset + position)
