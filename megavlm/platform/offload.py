"""Activations that wait for their backward pass in CPU memory."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

LEAST_BYTES = 64 * 2**10
"""Smaller tensors stay where they are."""


@dataclass(frozen=True)
class _Away:
    """A tensor that was copied to CPU memory, and where it belongs."""

    copy: torch.Tensor
    device: torch.device


class CpuOffload:
    """Copies what autograd keeps of a forward pass to CPU memory, and back when the backward pass asks for it.

    Copies are ordered by the stream that computes, from and to pinned memory, and not overlapped with computation. On
    the CPU platform they are copies all the same.
    """

    def __init__(self, modules: Iterable[torch.nn.Module], least_bytes: int = LEAST_BYTES) -> None:
        """`modules`: whose parameters stay where they are."""
        self._known = {
            parameter.untyped_storage().data_ptr() for module in modules for parameter in module.parameters()
        }
        self._least_bytes = least_bytes
        self.num_bytes = 0
        """Copied so far."""

    def __call__(self) -> contextlib.AbstractContextManager[Any]:
        """For the time of a forward pass."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> Any:
        num_bytes = tensor.numel() * tensor.element_size()
        if num_bytes < self._least_bytes or tensor.untyped_storage().data_ptr() in self._known:
            return tensor
        self.num_bytes += num_bytes
        pinned = tensor.device.type == "cuda"
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
        copy.copy_(tensor, non_blocking=True)
        return _Away(copy, tensor.device)

    @staticmethod
    def _unpack(kept: Any) -> torch.Tensor:
        if not isinstance(kept, _Away):
            assert isinstance(kept, torch.Tensor)
            return kept
        # `to` would hand out the copy itself on the CPU platform, which a backward pass may change in its place
        back = torch.empty(kept.copy.shape, dtype=kept.copy.dtype, device=kept.device)
        back.copy_(kept.copy, non_blocking=True)
        return back
