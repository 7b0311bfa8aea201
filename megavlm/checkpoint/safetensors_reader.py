"""Read tensors of a safetensors file one at a time, into memory of their own.

The safetensors library maps the whole file: what has been read stays resident, and counts as the process's memory. Here
it checks the file's header, and the bytes are read.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megavlm.checkpoint.safetensors_writer import DTYPE_CODES, TensorSpec
from megavlm.errors import use_error

_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


class SafetensorsFile:
    """An open file; may be read by several threads at once.

    Raises:
        UseError: no such file, or a header that is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt"):  # the header's own consistency
                pass
        except FileNotFoundError as error:
            raise use_error(str(path), "no such file", "the shard that the index names", "restore the file") from error
        except (SafetensorError, OSError) as error:
            raise use_error(str(path), f"unreadable ({error})", "a safetensors file", "restore the file") from error
        self._file = os.open(path, os.O_RDONLY)
        length = int.from_bytes(os.pread(self._file, 8, 0), "little")
        self._header: dict[str, Any] = json.loads(os.pread(self._file, length, 8))
        self._header.pop("__metadata__", None)
        self._data_start = 8 + length

    def __del__(self) -> None:
        if "_file" in vars(self):
            os.close(self._file)

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._header)

    def spec(self, name: str) -> TensorSpec:
        """Shape and type of a tensor.

        Raises:
            UseError: a type that weights are not stored in.
        """
        code = self._header[name]["dtype"]
        if code not in _DTYPES:
            raise use_error(f"{self.path} {name}", f"type {code}", f"one of {', '.join(_DTYPES)}", "convert it first")
        return TensorSpec(tuple(self._header[name]["shape"]), _DTYPES[code])

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """One tensor, or one row of its first dimension (which stays)."""
        spec = self.spec(name)
        shape = spec.shape if row is None else (1, *spec.shape[1:])
        tensor = torch.empty(math.prod(shape), dtype=spec.dtype)
        buffer: Any = tensor.view(torch.uint8).numpy()
        self.read_into(name, (row or 0) * tensor.nbytes, memoryview(buffer))
        return tensor.reshape(shape)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer with a tensor's bytes from `start` on."""
        position, offset = 0, self._data_start + self._header[name]["data_offsets"][0] + start
        while position < len(buffer):
            count = os.preadv(self._file, [buffer[position : position + 2**30]], offset + position)
            assert count, "the header was checked against the file's size"
            position += count
