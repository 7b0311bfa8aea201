"""A linear layer whose operands are FP8 numbers, multiplied in fp32: forward pass, gradient of inputs, of weights.

It takes the place of what Megatron-Core's column and row parallel linears call, and talks to the same ranks.
Shape suffixes: T tokens, I inputs and O outputs of this rank's part.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from megavlm.precision import quantise
from megavlm.precision.quantise import BLOCK, E4M3, E5M2


class Rounded(NamedTuple):
    """An operand: FP8 numbers in fp32, and what a 1 among them stands for.

    Scales of a whole tensor wait until the product is summed up, as on the hardware: sums of FP8 numbers are exact, or
    nearly so, in whatever order ranks add them. Those of blocks are powers of two, and in the values already.
    """

    values: torch.Tensor
    unit: torch.Tensor | float


class Quantiser(Protocol):
    """Rounds one operand of a linear layer."""

    @property
    def is_even(self) -> bool:
        """Whether rounding is the same along whatever is summed over."""

    def rounded(self, values: torch.Tensor, summed_dim: int, notes: bool) -> Rounded:
        """Round a matrix that is summed over along `summed_dim` (0 or 1).

        `notes`: whether a history of largest values takes these in.
        """


@dataclass(frozen=True)
class TensorScale:
    """Recipe `tensorwise`: the scale that the largest value of this tensor asks for.

    That of the whole tensor, on all ranks of `group` that share it. Transformer Engine does so for what sequence
    parallelism gathers; of other shards each has a scale of its own there, no larger than this one asks for.
    """

    dtype: torch.dtype
    group: dist.ProcessGroup

    @property
    def is_even(self) -> bool:
        """As `Quantiser` says."""
        return True

    def rounded(self, values: torch.Tensor, summed_dim: int, notes: bool) -> Rounded:
        """As `Quantiser` says."""
        scale = quantise.scale_of(_shared_amax(values, self.group), self.dtype)
        return Rounded(quantise.by_tensor(values, self.dtype, scale), 1 / scale)


@dataclass(frozen=True)
class BlockScale:
    """Recipe `blockwise`: scales of 1 x 128 numbers along what is summed over, of weights 128 x 128."""

    dtype: torch.dtype
    is_weight: bool

    @property
    def is_even(self) -> bool:
        """As `Quantiser` says."""
        return self.is_weight

    def rounded(self, values: torch.Tensor, summed_dim: int, notes: bool) -> Rounded:
        """As `Quantiser` says."""
        along = (1, BLOCK) if summed_dim == 1 else (BLOCK, 1)
        return Rounded(quantise.by_block(values, self.dtype, (BLOCK, BLOCK) if self.is_weight else along), 1.0)


@dataclass(frozen=True)
class MXScale:
    """Recipe `mxfp8`: scales of 32 numbers along what is summed over."""

    dtype: torch.dtype

    @property
    def is_even(self) -> bool:
        """As `Quantiser` says."""
        return False

    def rounded(self, values: torch.Tensor, summed_dim: int, notes: bool) -> Rounded:
        """As `Quantiser` says."""
        if summed_dim == 1:
            return Rounded(quantise.by_mx_block(values, self.dtype), 1.0)
        return Rounded(quantise.by_mx_block(values.t(), self.dtype).t(), 1.0)


@dataclass
class DelayedScale:
    """Recipe `delayed`: a scale from the largest values of the steps before; notes that of the present step.

    Transformer Engine moves the history on with every microbatch, here a step does, so that the number of microbatches
    and of data ranks changes nothing. A tensor that has no history yet is scaled by itself; there the scale is 1.
    """

    dtype: torch.dtype
    group: dist.ProcessGroup
    history_length: int
    uses_max: bool
    margin: int
    amax: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    """Largest value of the present step, on this rank."""
    history: list[float] = field(default_factory=list)
    """Largest values of the steps before, the latest first."""
    scale: float = 0.0
    """0: there is no history yet."""

    @property
    def is_even(self) -> bool:
        """As `Quantiser` says."""
        return True

    def rounded(self, values: torch.Tensor, summed_dim: int, notes: bool) -> Rounded:
        """As `Quantiser` says."""
        if notes:
            self.amax = torch.maximum(self.amax.to(values.device), quantise.largest(values))
        if self.scale:
            scale = torch.tensor(self.scale, device=values.device)
        else:
            scale = quantise.scale_of(_shared_amax(values, self.group), self.dtype, self.margin)
        return Rounded(quantise.by_tensor(values, self.dtype, scale), 1 / scale)

    def end_step(self, amax: float) -> None:
        """Move the history on: `amax` is the step's largest value on all ranks that hold this tensor."""
        self.history = [amax, *self.history][: self.history_length]
        chosen = max(self.history) if self.uses_max else self.history[0]
        before = torch.tensor(self.scale) if self.scale else None
        if chosen > 0 or self.scale:
            self.scale = float(quantise.scale_of(torch.tensor(chosen), self.dtype, self.margin, before))
        self.amax = torch.zeros(())


def _shared_amax(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    amax = quantise.largest(values)
    if group.size() > 1:
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
    return amax


@dataclass(frozen=True)
class Quantisers:
    """Of the three operands of a linear layer."""

    inputs: Quantiser
    weight: Quantiser
    gradient: Quantiser


@dataclass(frozen=True)
class Fp8Knobs:
    """How operands are rounded: the keys of the recipe's section `fp8` that concern numbers."""

    is_hybrid: bool
    margin: int
    history_length: int
    uses_max: bool


def quantisers_of(recipe: str, knobs: Fp8Knobs, group: dist.ProcessGroup) -> Quantisers:
    """Quantisers of one linear layer.

    Args:
        recipe: `delayed`, `tensorwise`, `blockwise` or `mxfp8`.
        knobs: see there.
        group: ranks that share the layer's tensors.
    """
    gradient = E5M2 if knobs.is_hybrid else E4M3

    def delayed(dtype: torch.dtype) -> DelayedScale:
        return DelayedScale(dtype, group, knobs.history_length, knobs.uses_max, knobs.margin)

    makers: dict[str, Callable[[], Quantisers]] = {
        "delayed": lambda: Quantisers(delayed(E4M3), delayed(E4M3), delayed(gradient)),
        "tensorwise": lambda: Quantisers(
            TensorScale(E4M3, group), TensorScale(E4M3, group), TensorScale(gradient, group)
        ),
        "blockwise": lambda: Quantisers(BlockScale(E4M3, False), BlockScale(E4M3, True), BlockScale(gradient, False)),
        "mxfp8": lambda: Quantisers(MXScale(E4M3), MXScale(E4M3), MXScale(gradient)),
    }
    return makers[recipe]()


class Fp8Linear:
    """Stands in for `_forward_impl` of one of Megatron-Core's parallel linears.

    Its products are those of FP8 tensor cores: FP8 numbers multiplied exactly and summed in fp32, then rounded once to
    the type of the activations. Inputs and weights are kept for the backward pass as they came, and rounded again
    along what is summed over there.
    """

    def __init__(self, quantisers: Quantisers, group: dist.ProcessGroup) -> None:
        """`group`: tensor-parallel ranks of the layer."""
        self.quantisers, self.group = quantisers, group

    def __call__(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: dist.ProcessGroup | None,
        **deferred: Any,
    ) -> torch.Tensor:
        """As Megatron-Core calls it; `deferred` are its knobs for weight gradients that are computed later."""
        assert not gradient_accumulation_fusion and not any(deferred.values()), "this needs kernels for CUDA"
        group = self.group if self.group.size() > 1 else None
        output: torch.Tensor = _Product.apply(
            input,
            weight,
            bias,
            self.quantisers,
            group if sequence_parallel else None,
            group if allreduce_dgrad else None,
            torch.is_grad_enabled(),
        )
        return output


class _Product(torch.autograd.Function):
    """inputs @ weight^T + bias of rounded operands."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        quantisers: Quantisers,
        gathers_over: dist.ProcessGroup | None,
        reduces_over: dist.ProcessGroup | None,
        notes: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight_OI)
        ctx.quantisers, ctx.gathers_over, ctx.reduces_over = quantisers, gathers_over, reduces_over
        ctx.has_bias = bias_O is not None
        whole = _gathered(inputs, gathers_over)
        inputs_TI = quantisers.inputs.rounded(whole.flatten(0, -2), 1, notes)
        output_TO = _product(inputs_TI, quantisers.weight.rounded(weight_OI, 1, notes), transposes=(False, True))
        if bias_O is not None:
            output_TO += bias_O
        return output_TO.to(inputs.dtype).view(*whole.shape[:-1], len(weight_OI))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        inputs, weight_OI = ctx.saved_tensors
        quantisers, grad_TO = ctx.quantisers, grads[0].flatten(0, -2)
        grad_inputs = grad_weight = grad_bias = None
        rounded_TO = quantisers.gradient.rounded(grad_TO, 1, True)
        if ctx.needs_input_grad[0]:
            grad_TI = _product(rounded_TO, quantisers.weight.rounded(weight_OI, 0, False))
            grad_inputs = grad_TI.to(inputs.dtype).view(*grads[0].shape[:-1], weight_OI.shape[1])
            grad_inputs = _scattered(grad_inputs, ctx.gathers_over)
            if ctx.reduces_over is not None:
                dist.all_reduce(grad_inputs, group=ctx.reduces_over)
        if ctx.needs_input_grad[1]:
            inputs_TI = quantisers.inputs.rounded(_gathered(inputs, ctx.gathers_over).flatten(0, -2), 0, False)
            if not quantisers.gradient.is_even:
                rounded_TO = quantisers.gradient.rounded(grad_TO, 0, False)
            grad_OI = _product(rounded_TO, inputs_TI, transposes=(True, False))
            grad_weight = grad_OI.to(weight_OI.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad_TO.sum(0)
        return grad_inputs, grad_weight, grad_bias, None, None, None, None


def _product(first: Rounded, second: Rounded, transposes: tuple[bool, bool] = (False, False)) -> torch.Tensor:
    """Matrix product in fp32 of operands that may have to be transposed first."""
    a, b = (one.values.t() if turned else one.values for one, turned in zip((first, second), transposes, strict=True))
    return (a @ b).mul_(first.unit * second.unit)


def _gathered(part: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Tokens of all sequence-parallel ranks."""
    if group is None:
        return part
    whole = part.new_empty(part.shape[0] * group.size(), *part.shape[1:])
    dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
    return whole


def _scattered(whole: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The sum over sequence-parallel ranks, of this rank's tokens."""
    if group is None:
        return whole
    part = whole.new_empty(whole.shape[0] // group.size(), *whole.shape[1:])
    dist.reduce_scatter_tensor(part, whole.contiguous(), group=group)
    return part
