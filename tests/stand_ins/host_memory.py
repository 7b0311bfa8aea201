"""A device apart from the host's memory, as far as Megatron-Core's hybrid optimizer asks for one.

It copies weights by `.cpu().pin_memory()` and asks `is_cuda` where a tensor is. While it sorts its parameters, every
tensor here counts as the device's until it was pinned; what is made of a pinned one by `float()` is the host's too.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Have the hybrid optimizer see two memories."""
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    sort = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def sorted_apart(self: Any, offload_fraction: float) -> Any:
        hosts: dict[int, torch.Tensor] = {}
        to_float = torch.Tensor.float

        def pinned(tensor: torch.Tensor, *_args: Any) -> torch.Tensor:
            hosts[id(tensor)] = tensor
            return tensor

        def as_float(tensor: torch.Tensor) -> torch.Tensor:
            made = to_float(tensor)
            return pinned(made) if id(tensor) in hosts else made

        is_cuda = property(lambda tensor: id(tensor) not in hosts)
        with (
            patch.object(torch.Tensor, "pin_memory", pinned),
            patch.object(torch.Tensor, "float", as_float),
            patch.object(torch.Tensor, "is_cuda", is_cuda),
        ):
            return sort(self, offload_fraction)

    with patch.object(HybridDeviceOptimizer, "_get_sub_optimizer_param_groups", sorted_apart):
        yield
