"""Linears with a place for an adapter: what they have in common, and those of the torch backend (Megatron-Core's).

Those of the torch backend also have a place for a weight that is not a matrix. What may stand in these places is
`megavlm/peft`'s; here is only where. With both empty they are Megatron-Core's. Transformer Engine's are in `te.py`.
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

    def forward(self, linear: "AdaptableLinear", input_: torch.Tensor) -> Output:
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


class AdaptableLinear:
    """A linear with a place for an adapter, of whatever backend; its parameter is `weight` [out, in].

    Attributes:
        is_column: ranks share its outputs; else its inputs.
        adapter: a LinearAdapter in that place; None: there is none.
        store: a WeightStore in place of the weight; None: the weight is a matrix.
        input_size: inputs of the whole linear.
        output_size: outputs of the whole linear.
        input_size_per_partition: inputs of this rank; of a column-parallel one that is all of them.
        output_size_per_partition: outputs of this rank; of a row-parallel one that is all of them.
        tp_group: the ranks.
        sequence_parallel: whether each rank sees a part of the tokens outside of it.
    """

    is_column: bool
    adapter: Any
    store: Any
    input_size: int
    output_size: int
    input_size_per_partition: int
    output_size_per_partition: int
    tp_group: Any
    sequence_parallel: bool
    weight: Any

    @property
    def own_bias(self) -> torch.Tensor | None:
        """The bias that is in the output already."""
        raise NotImplementedError

    def run(self, input_: torch.Tensor) -> Output:
        """Output, and the bias that is still to be added, without the adapter."""
        raise NotImplementedError

    def run_and_take(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """The same, and what the matrix takes: the input, or what a norm inside the linear makes of it."""
        return *self.run(input_), input_


def weight_of(linear: AdaptableLinear) -> torch.Tensor:
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


class ColumnLinear(ColumnParallelLinear, AdaptableLinear):
    """Column-parallel linear with these places."""

    is_column = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_module("adapter", None)
        self.store: WeightStore | None = None
        self.input_size_per_partition = self.input_size

    @property
    def own_bias(self) -> torch.Tensor | None:
        """The bias that is in the output already."""
        return None if self.skip_bias_add else self.bias

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
        return with_adapter(own, self.adapter, prefix, sharded_offsets, metadata)


class RowLinear(RowParallelLinear, AdaptableLinear):
    """Row-parallel linear with these places, which hands out a copy of its bias (the layer adds it later).

    Selective recompute of an MLP runs it inside an autograd function, and what that returns becomes an output of the
    function: the parameter itself would get a history that leads from one microbatch into the one before, without end.
    """

    is_column = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_module("adapter", None)
        self.store: WeightStore | None = None
        self.output_size_per_partition = self.output_size

    @property
    def own_bias(self) -> torch.Tensor | None:
        """The bias that is in the output already."""
        return None if self.skip_bias_add else self.bias

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
        return with_adapter(own, self.adapter, prefix, sharded_offsets, metadata)


def with_adapter(
    own: dict[str, Any],
    adapter: LinearAdapter | None,
    prefix: str,
    sharded_offsets: tuple[Any, ...],
    metadata: dict[str, Any] | None,
) -> dict[str, Any]:
    """Sharded weights of a linear with those of its adapter, which Megatron-Core takes for replicated.

    Args:
        own: what Megatron-Core says of the linear.
        adapter: of the linear.
        prefix: of names.
        sharded_offsets: as Megatron-Core hands them on.
        metadata: as Megatron-Core hands it on.
    """
    if adapter is None:
        return own
    state = {name: value for name, value in own.items() if not name.startswith(f"{prefix}adapter.")}
    return state | adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata)
