"""Image-text contrastive losses over the embeddings of all ranks of a group: CLIP's softmax and SigLIP's sigmoid.

Embeddings are gathered (memory grows with the number of all pairs); logits are made block by block of columns, for this
rank's rows only, and made again in the backward pass: nothing grows with its square. Ranks may hold different
numbers of pairs, also none.

Shape suffixes: N pairs of this rank, M pairs of all ranks of the group, D width of embeddings, C columns of a block.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

DEFAULT_BLOCK_SIZE = 4096
SAME_COSINE = 1e-6
"""Cosines that are closer are the same: two texts of the same words must not differ by rounding."""


class _Gather(torch.autograd.Function):
    """Rows of all ranks, in the order of ranks. Backward: the sum over ranks of what they want changed."""

    @staticmethod
    def forward(ctx: Any, rows_ND: torch.Tensor, counts: list[int], group: dist.ProcessGroup) -> torch.Tensor:
        ctx.counts, ctx.group = counts, group
        if group.size() == 1:
            return rows_ND.clone()
        padded_XD = F.pad(rows_ND, (0, 0, 0, max(counts) - len(rows_ND)))
        gathered = [torch.empty_like(padded_XD) for _ in counts]
        dist.all_gather(gathered, padded_XD, group=group)
        return torch.cat([part_XD[:count] for part_XD, count in zip(gathered, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        grad_MD = grads[0].contiguous()
        if ctx.group.size() == 1:
            return grad_MD, None, None
        grad_MD = grad_MD.clone()
        dist.all_reduce(grad_MD, group=ctx.group)
        return grad_MD.split(ctx.counts)[ctx.group.rank()].contiguous(), None, None


class _BlockwiseLogSumExp(torch.autograd.Function):
    """log sum_m exp(scale * row_n . column_m), without ever holding [N, M]."""

    @staticmethod
    def forward(
        ctx: Any, rows_ND: torch.Tensor, columns_MD: torch.Tensor, scale: torch.Tensor, block_size: int
    ) -> torch.Tensor:
        largest_N = rows_ND.new_full((len(rows_ND),), -torch.inf)
        total_N = torch.zeros_like(largest_N)
        for block_CD in columns_MD.split(block_size):
            logits_NC = scale * (rows_ND @ block_CD.T)
            new_largest_N = torch.maximum(largest_N, logits_NC.max(dim=1).values)
            total_N = total_N * (largest_N - new_largest_N).exp() + (logits_NC - new_largest_N[:, None]).exp().sum(1)
            largest_N = new_largest_N
        log_total_N = largest_N + total_N.log()
        ctx.save_for_backward(rows_ND, columns_MD, scale, log_total_N)
        ctx.block_size = block_size
        return log_total_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        rows_ND, columns_MD, scale, log_total_N = ctx.saved_tensors
        grad_ND, grad_MD, grad_scale = torch.zeros_like(rows_ND), torch.empty_like(columns_MD), torch.zeros_like(scale)
        for block_CD, grad_CD in zip(columns_MD.split(ctx.block_size), grad_MD.split(ctx.block_size), strict=True):
            cosine_NC = rows_ND @ block_CD.T
            share_NC = (scale * cosine_NC - log_total_N[:, None]).exp_() * grads[0][:, None]
            grad_scale += (share_NC * cosine_NC).sum()
            grad_ND += scale * (share_NC @ block_CD)
            grad_CD.copy_(scale * (share_NC.T @ rows_ND))
        return grad_ND, grad_MD, grad_scale, None


class _BlockwiseSigmoidLoss(torch.autograd.Function):
    """sum_m -log sigmoid(label_nm * (scale * row_n . column_m + bias)); label 1 for m = first + n, else -1."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: torch.Tensor,
        columns_MD: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        first: int,
        block_size: int,
    ) -> torch.Tensor:
        loss_N = torch.zeros_like(rows_ND[:, 0])
        for start in range(0, len(columns_MD), block_size):
            block_CD = columns_MD[start : start + block_size]
            labels_NC = _labels(len(rows_ND), first - start, block_CD)
            loss_N -= F.logsigmoid(labels_NC * (scale * (rows_ND @ block_CD.T) + bias)).sum(1)
        ctx.save_for_backward(rows_ND, columns_MD, scale, bias)
        ctx.first, ctx.block_size = first, block_size
        return loss_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        rows_ND, columns_MD, scale, bias = ctx.saved_tensors
        grad_ND, grad_MD = torch.zeros_like(rows_ND), torch.empty_like(columns_MD)
        grad_scale, grad_bias = torch.zeros_like(scale), torch.zeros_like(bias)
        for start in range(0, len(columns_MD), ctx.block_size):
            block_CD = columns_MD[start : start + ctx.block_size]
            labels_NC = _labels(len(rows_ND), ctx.first - start, block_CD)
            cosine_NC = rows_ND @ block_CD.T
            grad_NC = -labels_NC * torch.sigmoid(-labels_NC * (scale * cosine_NC + bias)) * grads[0][:, None]
            grad_scale += (grad_NC * cosine_NC).sum()
            grad_bias += grad_NC.sum()
            grad_ND += scale * (grad_NC @ block_CD)
            grad_MD[start : start + ctx.block_size] = scale * (grad_NC.T @ rows_ND)
        return grad_ND, grad_MD, grad_scale, grad_bias, None, None


def _labels(num_rows: int, offset: int, block_CD: torch.Tensor) -> torch.Tensor:
    """[N, C]: 1 where row n belongs to column offset + n of the block, -1 elsewhere."""
    rows_N = torch.arange(num_rows, device=block_CD.device)
    columns_C = torch.arange(len(block_CD), device=block_CD.device)
    return torch.where(rows_N[:, None] + offset == columns_C[None, :], 1.0, -1.0)


def _pairs_of_ranks(num_pairs: int, group: dist.ProcessGroup, device: torch.device) -> list[int]:
    """How many pairs each rank of the group holds."""
    if group.size() == 1:
        return [num_pairs]
    mine = torch.tensor([num_pairs], device=device)
    everyones = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyones, mine, group=group)
    return [int(count) for count in everyones]


def retrieval_hits(
    rows_ND: torch.Tensor, columns_MD: torch.Tensor, first: int, block_size: int = DEFAULT_BLOCK_SIZE
) -> torch.Tensor:
    """Whether each row finds its own column first: no other one is more similar, float32 [N]. Their mean is recall@1.

    Args:
        rows_ND: embeddings, normalised; row n belongs to column first + n.
        columns_MD: what is searched, normalised.
        first: column of the first row.
        block_size: columns that are compared at a time.
    """
    own_N = (rows_ND * columns_MD[first : first + len(rows_ND)]).sum(1)
    best_N = torch.full_like(own_N, -torch.inf)
    for start in range(0, len(columns_MD), block_size):
        block_CD = columns_MD[start : start + block_size]
        is_own_NC = _labels(len(rows_ND), first - start, block_CD) > 0
        cosines_NC = (rows_ND @ block_CD.T).masked_fill(is_own_NC, -torch.inf)
        best_N = torch.maximum(best_N, cosines_NC.max(dim=1).values)
    return (best_N <= own_N + SAME_COSINE).float()


def clip_loss(
    images_ND: torch.Tensor,
    texts_ND: torch.Tensor,
    logit_scale: torch.Tensor,
    group: dist.ProcessGroup,
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Symmetric cross entropy over all pairs of the group: Radford et al., arXiv 2103.00020, section 2.3 and figure 3.

    Args:
        images_ND: embeddings of images, normalised; row n belongs to row n of `texts_ND`.
        texts_ND: embeddings of texts, normalised.
        logit_scale: scalar parameter, the natural logarithm of 1 / temperature.
        group: the ranks whose pairs are each other's negatives (data parallel). Every one calls this, and every one
            calls backward: gradients travel to the rank that an embedding came from. So a rank without pairs gives
            embeddings of no rows that require gradients where the others' do.
        block_size: columns of logits made at a time.

    Returns:
        The sum over this rank's pairs (fp32), their number (fp32), and no metrics. The gradient is that of the sum over
        all ranks, also of `logit_scale` once it is summed over the ranks.
    """
    images_ND, texts_ND, scale = images_ND.float(), texts_ND.float(), logit_scale.float().exp()
    counts = _pairs_of_ranks(len(images_ND), group, images_ND.device)
    images_MD: torch.Tensor = _Gather.apply(images_ND, counts, group)
    texts_MD: torch.Tensor = _Gather.apply(texts_ND, counts, group)
    positive_N = scale * (images_ND * texts_ND).sum(1)
    to_texts_N: torch.Tensor = _BlockwiseLogSumExp.apply(images_ND, texts_MD, scale, block_size)
    to_images_N: torch.Tensor = _BlockwiseLogSumExp.apply(texts_ND, images_MD, scale, block_size)
    loss_N = (to_texts_N + to_images_N) / 2 - positive_N
    return loss_N.sum(), loss_N.new_tensor(float(len(loss_N))), {}


def siglip_loss(
    images_ND: torch.Tensor,
    texts_ND: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    group: dist.ProcessGroup,
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """A binary decision for every image and text of the group: Zhai et al., arXiv 2303.15343, section 3.2.

    Args:
        images_ND: embeddings of images, normalised; row n belongs to row n of `texts_ND`.
        texts_ND: embeddings of texts, normalised.
        logit_scale: scalar parameter, the natural logarithm of 1 / temperature.
        logit_bias: scalar parameter.
        group: as in `clip_loss`.
        block_size: columns of logits made at a time.

    Returns:
        The sum over this rank's images (fp32), their number (fp32), and no metrics; gradients as in `clip_loss`.
    """
    images_ND, texts_ND = images_ND.float(), texts_ND.float()
    scale, bias = logit_scale.float().exp(), logit_bias.float()
    counts = _pairs_of_ranks(len(images_ND), group, images_ND.device)
    texts_MD: torch.Tensor = _Gather.apply(texts_ND, counts, group)
    first = sum(counts[: group.rank()])
    loss_N: torch.Tensor = _BlockwiseSigmoidLoss.apply(images_ND, texts_MD, scale, bias, first, block_size)
    return loss_N.sum(), loss_N.new_tensor(float(len(loss_N))), {}
