"""Losses on boxes and coordinates, for models that point at things; those on masks are in `masks.py`.

Shape suffixes: B boxes, K bins of a coordinate; where coordinates are tokens, W is this rank's part of the vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist

_TINY = 1e-9


def generalized_iou(first_B4: torch.Tensor, second_B4: torch.Tensor) -> torch.Tensor:
    """Generalised intersection over union of box b with box b, from -1 to 1: arXiv 1902.09630, algorithm 2.

    Args:
        first_B4: left, top, right, bottom in any unit. A box with its right left of its left has no area.
        second_B4: the same.

    Returns:
        fp32 [B]; 0 for two boxes that are the same point.
    """
    first_B4, second_B4 = first_B4.float(), second_B4.float()
    intersection_B = _area(
        torch.maximum(first_B4[:, :2], second_B4[:, :2]), torch.minimum(first_B4[:, 2:], second_B4[:, 2:])
    )
    union_B = _area(first_B4[:, :2], first_B4[:, 2:]) + _area(second_B4[:, :2], second_B4[:, 2:]) - intersection_B
    hull_B = _area(torch.minimum(first_B4[:, :2], second_B4[:, :2]), torch.maximum(first_B4[:, 2:], second_B4[:, 2:]))
    return intersection_B / union_B.clamp(min=_TINY) - (hull_B - union_B) / hull_B.clamp(min=_TINY)


def _area(low_B2: torch.Tensor, high_B2: torch.Tensor) -> torch.Tensor:
    """Area between two corners; 0 when the high one is not beyond the low one."""
    return (high_B2 - low_B2).clamp(min=0).prod(dim=1)


def corners_of(centres_B4: torch.Tensor) -> torch.Tensor:
    """Left, top, right, bottom of boxes given as centre x, centre y, width, height."""
    middle_B2, size_B2 = centres_B4.split(2, dim=1)
    return torch.cat((middle_B2 - size_B2 / 2, middle_B2 + size_B2 / 2), dim=1)


def box_loss(
    predicted_B4: torch.Tensor, target_B4: torch.Tensor, l1_weight: float = 5.0, giou_weight: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """L1 over the four coordinates and 1 - generalised IoU, arXiv 2005.12872 (DETR), section 3.1 and appendix A.2.

    Args:
        predicted_B4: left, top, right, bottom, as shares of the image's width and height.
        target_B4: the same; where DETR's L1 is over centre and size, this one is over the corners.
        l1_weight: weight of L1 (DETR's default).
        giou_weight: weight of 1 - generalised IoU (DETR's default).

    Returns:
        The sum over boxes (fp32), their number (fp32), and both parts as sums without weight.
    """
    l1_B = (predicted_B4.float() - target_B4.float()).abs().sum(1)
    giou_B = 1 - generalized_iou(predicted_B4, target_B4)
    loss_sum = (l1_weight * l1_B + giou_weight * giou_B).sum()
    metrics = {"box/l1": l1_B.detach().sum(), "box/giou": giou_B.detach().sum()}
    return loss_sum, loss_sum.new_tensor(float(len(l1_B))), metrics


def expected_coordinate(logits_BK: torch.Tensor) -> torch.Tensor:
    """Coordinates from 0 to 1 out of logits over K coordinate tokens, fp32 [B]: soft-argmax, arXiv 1711.08229.

    Token k stands for k / (K - 1), as in vocabularies of location tokens; the result passes gradients to all of them.
    """
    values_K = torch.linspace(0, 1, logits_BK.shape[1], device=logits_BK.device)
    return logits_BK.float().softmax(dim=1) @ values_K


class _VocabularyParallelMean(torch.autograd.Function):
    """sum_k p_k value_k, with p the softmax over some ids, whose logits lie on several ranks."""

    @staticmethod
    def forward(
        ctx: Any, logits_BW: torch.Tensor, ids_K: torch.Tensor, values_K: torch.Tensor, group: dist.ProcessGroup
    ) -> torch.Tensor:
        width, is_shared = logits_BW.shape[1], group.size() > 1 and len(logits_BW) > 0
        local_K = ids_K - group.rank() * width
        here_K = (local_K >= 0) & (local_K < width)
        columns, values = local_K[here_K], values_K[here_K]
        picked = logits_BW[:, columns].float()
        # a rank may have none of the ids
        largest_B = torch.cat((picked, picked.new_full((len(picked), 1), -torch.inf)), dim=1).max(dim=1).values
        if is_shared:
            dist.all_reduce(largest_B, op=dist.ReduceOp.MAX, group=group)
        exponents = (picked - largest_B[:, None]).exp()
        sums_2B = torch.stack((exponents.sum(1), exponents @ values))
        if is_shared:
            dist.all_reduce(sums_2B, group=group)
        mean_B = sums_2B[1] / sums_2B[0]
        ctx.save_for_backward(exponents / sums_2B[0][:, None], columns, values, mean_B)
        ctx.width = width
        return mean_B

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        shares, columns, values, mean_B = ctx.saved_tensors
        grad_BW = shares.new_zeros(len(mean_B), ctx.width)
        grad_BW[:, columns] = grads[0][:, None] * shares * (values - mean_B[:, None])
        return grad_BW, None, None, None


def expected_coordinate_of_vocabulary(
    logits_BW: torch.Tensor, ids_K: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """`expected_coordinate` of the logits of K coordinate tokens out of a sharded vocabulary: fp32 [B], on every rank.

    Args:
        logits_BW: this rank's part of the logits of some tokens; rank r holds ids r * W to (r + 1) * W - 1.
        ids_K: int64 ids of the coordinate tokens; the k-th stands for k / (K - 1).
        group: the ranks that share the vocabulary (tensor parallel).
    """
    values_K = torch.linspace(0, 1, len(ids_K), device=logits_BW.device)
    mean_B: torch.Tensor = _VocabularyParallelMean.apply(logits_BW, ids_K, values_K, group)
    return mean_B
