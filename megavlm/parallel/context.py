"""Which tokens of a packed row a context-parallel rank holds.

Each sample is cut into 2*cp chunks; rank r holds chunks r and 2*cp-1-r ("zig-zag"), so that causal attention costs
every rank the same. This is the order of Transformer Engine's and Megatron-Core's packed context parallelism.

Shape suffixes: T tokens of the whole packed row, L tokens of one rank (T / cp).
"""

from typing import Any

import torch
import torch.distributed as dist

from megavlm.errors import UseError


def zigzag_index(cu_seqlens: torch.Tensor, cp_size: int, cp_rank: int) -> torch.Tensor:
    """Global positions of the tokens that a rank holds, in its local order.

    Args:
        cu_seqlens: [num_samples + 1] sample borders; every length a multiple of 2 * cp_size.
        cp_size: context-parallel ranks.
        cp_rank: this one.

    Returns:
        index_L: int64, L = T / cp_size.

    Raises:
        UseError: a sample's padded length does not divide.
    """
    borders = cu_seqlens.tolist()
    if cp_size == 1:
        return torch.arange(borders[-1])
    parts = []
    for start, end in zip(borders[:-1], borders[1:], strict=True):
        chunk, rest = divmod(end - start, 2 * cp_size)
        if rest:
            raise UseError(
                f"packed row: got a sample of {end - start} tokens; expected a multiple of {2 * cp_size} "
                f"(2 * context_parallel_size); fix: pad every sample when packing"
            )
        mirror = 2 * cp_size - 1 - cp_rank
        parts.append(torch.arange(start + cp_rank * chunk, start + (cp_rank + 1) * chunk))
        parts.append(torch.arange(start + mirror * chunk, start + (mirror + 1) * chunk))
    return torch.cat(parts)


def local_part(tensor_T: torch.Tensor, cu_seqlens: torch.Tensor, cp_size: int, cp_rank: int) -> torch.Tensor:
    """The part of a per-token tensor [T, ...] that a rank holds: [T / cp, ...]."""
    if cp_size == 1:
        return tensor_T
    return tensor_T.index_select(0, zigzag_index(cu_seqlens, cp_size, cp_rank).to(tensor_T.device))


class _SummedOverContext(torch.autograd.Function):
    """All-reduce both ways: the objective is the sum of what every rank makes of the result."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        grad = grads[0].clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def summed_over_context(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over context ranks, on each of them, differentiable.

    Where every rank computes the same loss from it, each must give its share (1 / cp) as its own, so that the sum over
    ranks is the loss.
    """
    if group.size() == 1:
        return tensor
    total: torch.Tensor = _SummedOverContext.apply(tensor, group)
    return total
