"""What tensor and context parallel ranks exchange, with gradients. Rows are on the first axis."""

from typing import Any

import torch
import torch.distributed as dist


class Copy(torch.autograd.Function):
    """The same tensor on every rank; gradients are added up."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """Nothing to do."""
        ctx.group = group
        return tensor

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Sum."""
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class Sum(torch.autograd.Function):
    """The sum over ranks, on every rank."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """Sum."""
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Every rank has the whole gradient."""
        return grads[0], None


class Gather(torch.autograd.Function):
    """Rows of all ranks behind each other; gradients are added up, and each rank gets its rows'."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """Gather."""
        ctx.group = group
        return _gather(tensor, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Scatter the sum."""
        return _scatter_sum(grads[0], ctx.group), None


class ScatterSum(torch.autograd.Function):
    """The sum over ranks, each rank gets its rows."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """Scatter the sum."""
        ctx.group = group
        return _scatter_sum(tensor, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Gather."""
        return _gather(grads[0], ctx.group), None


def _gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts)


def _scatter_sum(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total.chunk(group.size())[group.rank()].contiguous()
