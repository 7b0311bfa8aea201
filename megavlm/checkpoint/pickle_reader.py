"""Read weights that torch.save wrote, for `--allow-pickle`: tensors in a dict, and nothing that could run.

torch's restricted unpickler (`weights_only`) makes tensors and plain containers only; any other content is an error.
"""

import pickle
from pathlib import Path
from typing import Any

import torch

from megavlm.checkpoint.safetensors_writer import DTYPE_CODES, TensorSpec
from megavlm.errors import use_error


class PickleFile:
    """An open file of weights, mapped into memory; as `SafetensorsFile`.

    Raises:
        UseError: no such file, or content that is no dict of tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        expected = "tensors by name, as torch.save writes them"
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except FileNotFoundError as error:
            raise use_error(str(path), "no such file", "the shard that the index names", "restore the file") from error
        except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise use_error(str(path), f"unreadable ({said})", expected, "convert it to safetensors") from error
        if not isinstance(loaded, dict) or not all(isinstance(one, torch.Tensor) for one in loaded.values()):
            raise use_error(str(path), f"a {type(loaded).__name__} of other things", expected, "convert it first")
        self._tensors: dict[str, torch.Tensor] = loaded

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._tensors)

    def spec(self, name: str) -> TensorSpec:
        """Shape and type of a tensor.

        Raises:
            UseError: a type that weights are not stored in.
        """
        tensor = self._tensors[name]
        if tensor.dtype not in DTYPE_CODES:
            raise use_error(
                f"{self.path} {name}",
                f"type {tensor.dtype}",
                f"one of {', '.join(map(str, DTYPE_CODES))}",
                "convert it",
            )
        return TensorSpec(tuple(tensor.shape), tensor.dtype)

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """A copy of one tensor, or of one row of its first dimension (which stays)."""
        tensor = self._tensors[name] if row is None else self._tensors[name][row : row + 1]
        return tensor.contiguous().clone()

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer with a tensor's bytes from `start` on, row by row; both are multiples of its type's size."""
        tensor = self._tensors[name]
        first, last = start // tensor.itemsize, (start + len(buffer)) // tensor.itemsize
        values = tensor.view(-1)[first:last] if tensor.is_contiguous() else tensor.take(torch.arange(first, last))
        data: Any = values.view(torch.uint8).numpy()
        buffer[:] = memoryview(data)
