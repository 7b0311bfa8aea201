"""A device apart from the host's memory, as far as Megatron-Core's hybrid optimizer asks for one.

It copies weights by `.cpu().pin_memory()` and asks `is_cuda` where a tensor is. While it sorts its parameters, every
tensor here counts as the device's until it was pinned; what is made of a pinned one is the host's too.
"""

import contextlib
from collections.abc import Callable, Iterator
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

        def pinned(tensor: torch.Tensor, *_args: Any) -> torch.Tensor:
            hosts[id(tensor)] = tensor
            return tensor

        def staying(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
            make = vars(torch.Tensor).get(name) or vars(torch._C.TensorBase)[name]

            def made(tensor: torch.Tensor) -> torch.Tensor:
                result: torch.Tensor = make(tensor)
                return pinned(result) if id(tensor) in hosts else result

            return made

        with contextlib.ExitStack() as patches:
            for name in ("detach", "clone", "float"):
                patches.enter_context(patch.object(torch.Tensor, name, staying(name)))
            patches.enter_context(patch.object(torch.Tensor, "pin_memory", pinned))
            patches.enter_context(patch.object(torch.Tensor, "is_cuda", property(lambda one: id(one) not in hosts)))
            return sort(self, offload_fraction)

    with patch.object(HybridDeviceOptimizer, "_get_sub_optimizer_param_groups", sorted_apart):
        yield
