"""Linears of the torch backend: Megatron-Core's, with a place for an adapter and for a weight that is not a matrix.

What may stand in these places is `megavlm/peft`'s; here is only where. With both empty they are Megatron-Core's.
"""

from typing import Any, Protocol

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import nn

Output = tuple[torch.Tensor, torch.Tensor | None]
"""What a linear gives: its output, and a bias that is still to be added."""


class LinearAdapter(nn.Module):
    """What stands in a linear's place for an adapter; `enabled` False leaves the linear as it is."""

    enabled = True

    def forward(self, linear: "ColumnLinear | RowLinear", input_: torch.Tensor) -> Output:
        """The output of the linear (`linear.run` gives it without the adapter), adapted."""
        raise NotImplementedError

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """This rank's part of the linear's weight [out, in] with the adapter in it, fp32."""
        raise NotImplementedError

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Sharded weights of the adapter."""
        raise NotImplementedError


class WeightStore(Protocol):
    """A frozen weight in another form than a matrix."""

    def matrix(self) -> torch.Tensor:
        """This rank's part of the weight [out, in], made anew with each call."""


def weight_of(linear: "ColumnLinear | RowLinear") -> torch.Tensor:
    """This rank's part of a linear's weight as a matrix."""
    weight: torch.Tensor = linear.weight if linear.store is None else linear.store.matrix()
    return weight


class _FromStore(torch.autograd.Function):
    """input @ weight^T for a weight that is made when it is needed, and again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, input_: torch.Tensor, store: WeightStore) -> torch.Tensor:
        ctx.store = store
        return input_ @ store.matrix().to(input_.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0] @ ctx.store.matrix().to(grads[0].dtype), None


def _linear_from_store(
    store: WeightStore,
    input: torch.Tensor,
    bias: torch.Tensor | None,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: Any,
    **_unused: Any,
) -> torch.Tensor:
    """The same as Megatron-Core's `linear_with_frozen_weight`, which would keep the matrix for the backward pass."""
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)
    output: torch.Tensor = _FromStore.apply(input, store)
    return output if bias is None else output + bias


class ColumnLinear(ColumnParallelLinear):
    """Column-parallel linear with these places."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_module("adapter", None)
        self.store: WeightStore | None = None

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Output:
        """Output, and the bias that is still to be added."""
        if self.adapter is None or not self.adapter.enabled:
            return self.run(input_, *args, **kwargs)
        output: Output = self.adapter(self, input_)
        return output

    def run(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Output:
        """The same without the adapter."""
        output: Output = super().forward(input_, *args, **kwargs)
        return output

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.store is not None:
            return _linear_from_store(self.store, input, *args, **kwargs)
        output: torch.Tensor = super()._forward_impl(input, weight, *args, **kwargs)
        return output

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Sharded weights, the adapter's by its own word."""
        own = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return _with_adapter(own, self.adapter, prefix, sharded_offsets, metadata)


class RowLinear(RowParallelLinear):
    """Row-parallel linear with these places, which hands out a copy of its bias (the layer adds it later).

    Selective recompute of an MLP runs it inside an autograd function, and what that returns becomes an output of the
    function: the parameter itself would get a history that leads from one microbatch into the one before, without end.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_module("adapter", None)
        self.store: WeightStore | None = None

    def forward(self, input_: torch.Tensor) -> Output:
        """Output, and the bias that is still to be added."""
        if self.adapter is None or not self.adapter.enabled:
            return self.run(input_)
        output: Output = self.adapter(self, input_)
        return output

    def run(self, input_: torch.Tensor) -> Output:
        """The same without the adapter."""
        output, bias = super().forward(input_)
        return output, None if bias is None else bias.clone()

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.store is not None:
            return _linear_from_store(self.store, input, *args, **kwargs)
        output: torch.Tensor = super()._forward_impl(input, weight, *args, **kwargs)
        return output

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Sharded weights, the adapter's by its own word."""
        own = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return _with_adapter(own, self.adapter, prefix, sharded_offsets, metadata)


def _with_adapter(
    own: dict[str, Any],
    adapter: LinearAdapter | None,
    prefix: str,
    sharded_offsets: tuple[Any, ...],
    metadata: dict[str, Any] | None,
) -> dict[str, Any]:
    """Megatron-Core takes whatever is inside a linear for replicated."""
    if adapter is None:
        return own
    state = {name: value for name, value in own.items() if not name.startswith(f"{prefix}adapter.")}
    return state | adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata)
