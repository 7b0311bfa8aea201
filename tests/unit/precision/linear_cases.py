"""What the pool runs for test_linear.py."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megavlm.precision import quantise
from megavlm.precision.linear import DelayedScale, Fp8Knobs, Fp8Linear, quantisers_of
from megavlm.precision.quantise import E4M3, E5M2

KNOBS = Fp8Knobs(is_hybrid=True, margin=0, history_length=1, uses_max=False)
TOKENS, INPUTS, OUTPUTS = 64, 256, 512


def _example() -> tuple[torch.Tensor, ...]:
    """Inputs, two weights, and the gradient of the output: numbers of many magnitudes."""
    generator = torch.Generator().manual_seed(3)

    def spread(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * torch.exp(torch.randn(shape, generator=generator))

    return spread(TOKENS, 1, INPUTS), spread(OUTPUTS, INPUTS), spread(INPUTS, OUTPUTS), spread(TOKENS, 1, INPUTS)


def _forward(linear: Fp8Linear, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return linear(inputs, weight, None, False, False, False, None)


def one_layer(recipe: str, is_hybrid: bool) -> dict[str, torch.Tensor]:
    """Output and gradients of one layer on one rank, and those written out."""
    group = dist.group.WORLD
    assert group is not None
    knobs = Fp8Knobs(is_hybrid, 0, 1, False)
    inputs, weight, _, _ = _example()
    upstream = _example()[2].t().reshape(OUTPUTS, INPUTS)[:TOKENS].repeat(1, 2)[:, None]  # [T, 1, O]
    inputs.requires_grad_()
    weight.requires_grad_()
    output = _forward(Fp8Linear(quantisers_of(recipe, knobs, group), group), inputs, weight)
    output.backward(upstream)
    assert inputs.grad is not None and weight.grad is not None
    x, w, g = inputs.detach()[:, 0], weight.detach(), upstream[:, 0]
    gradient = E5M2 if is_hybrid else E4M3
    return {
        "output": output.detach()[:, 0],
        "expected output": _rounded(recipe, x, E4M3, 1) @ _rounded(recipe, w, E4M3, 1, True).t(),
        "dgrad": inputs.grad[:, 0],
        "expected dgrad": _rounded(recipe, g, gradient, 1) @ _rounded(recipe, w, E4M3, 0, True),
        "wgrad": weight.grad,
        "expected wgrad": _rounded(recipe, g, gradient, 0).t() @ _rounded(recipe, x, E4M3, 0),
        "unrounded": x @ w.t(),
    }


def _rounded(recipe: str, values: torch.Tensor, dtype: torch.dtype, summed: int, is_weight: bool = False) -> Any:
    """Quantised and dequantised, written out; `delayed` has no history yet, and is as `tensorwise`."""
    if recipe in ("delayed", "tensorwise"):
        scale = torch.finfo(dtype).max / values.abs().max()
        return (values * scale).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).float() / scale
    turned = values if summed == 1 else values.t()
    if recipe == "mxfp8":
        rounded = quantise.by_mx_block(turned, dtype)
    else:
        rounded = quantise.by_block(turned, dtype, (128, 128) if is_weight else (1, 128))
    return rounded if summed == 1 else rounded.t()


def scaled_mm() -> tuple[torch.Tensor, torch.Tensor]:
    """The forward pass of `tensorwise`, and torch's own product of FP8 tensors with scales."""
    group = dist.group.WORLD
    assert group is not None
    inputs, weight, _, _ = _example()
    ours = _forward(Fp8Linear(quantisers_of("tensorwise", KNOBS, group), group), inputs, weight)[:, 0]
    operands, units = [], []
    for values in (inputs[:, 0], weight):
        scale = 448 / values.abs().max()
        operands.append((values * scale).to(E4M3))
        units.append(1 / scale)
    theirs = torch._scaled_mm(operands[0], operands[1].t(), units[0], units[1], out_dtype=torch.float32)
    return ours, theirs


def two_layers(recipe: str, sequence_parallel: bool, shares_amax: bool = True) -> dict[str, torch.Tensor]:
    """Column and row parallel layer in series on all ranks: whole output, and gradients put together.

    With `shares_amax` false each rank has a scale of its own.
    """
    world = dist.group.WORLD
    assert world is not None
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    config = ModelParallelConfig(
        tensor_model_parallel_size=world.size(),
        sequence_parallel=sequence_parallel,
        params_dtype=torch.float32,
        perform_initialization=False,
    )
    options: dict[str, Any] = {"config": config, "init_method": None, "bias": False, "tp_group": world}
    first = ColumnParallelLinear(INPUTS, OUTPUTS, gather_output=False, **options)
    second = RowParallelLinear(OUTPUTS, INPUTS, input_is_parallel=True, skip_bias_add=True, **options)
    inputs, weight_1, weight_2, upstream = _example()
    rank, size = world.rank(), world.size()
    with torch.no_grad():
        first.weight.copy_(weight_1.chunk(size)[rank])
        second.weight.copy_(weight_2.chunk(size, dim=1)[rank])
    for module in (first, second):
        quantisers = quantisers_of(recipe, KNOBS, world if shares_amax else alone)
        vars(module)["_forward_impl"] = Fp8Linear(quantisers, world)
    if sequence_parallel:
        inputs, upstream = inputs.chunk(size)[rank].clone(), upstream.chunk(size)[rank]
    inputs.requires_grad_()
    output, _ = second(first(inputs)[0])
    output.backward(upstream)
    whole = {"weight_1": (first.weight.grad, 0), "weight_2": (second.weight.grad, 1)}
    if sequence_parallel:
        whole |= {"output": (output.detach(), 0), "inputs": (inputs.grad, 0)}
    found = {"output": output.detach(), "inputs": inputs.grad}
    return found | {name: _gather(part, dim) for name, (part, dim) in whole.items()}


def _gather(part: torch.Tensor, dim: int) -> torch.Tensor:
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts, dim)


def delayed_scales(
    amaxes: list[float], length: int, uses_max: bool, margin: int
) -> tuple[list[float], list[torch.Tensor]]:
    """Scale after each step, and what a value of 3 is rounded to before each of them."""
    group = dist.group.WORLD
    assert group is not None
    scale = DelayedScale(E4M3, group, length, uses_max, margin)
    scales, seen = [], []
    for amax in amaxes:
        rounded = scale.rounded(torch.tensor([[3.0, amax]]), 1, notes=True)
        seen.append(rounded.values * rounded.unit)
        scale.end_step(float(scale.amax))
        scales.append(scale.scale)
    return scales, seen
