"""Log-probabilities of given tokens from logits that are sharded over the vocabulary.

Shape suffixes: T tokens, W this rank's part of the vocabulary.
Source: Shoeybi et al., arXiv 1909.08053, section 3 (vocabulary-parallel cross entropy).
"""

import functools
from typing import Any

import torch
import torch.distributed as dist

from megavlm.losses.chunked import Logits, ProjectedLogits, over_chunks


def _shifted(
    logits_TW: torch.Tensor, labels_T: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp32 logits less the largest of all ranks, that one, each label's place here, and whether it is elsewhere."""
    width = logits_TW.shape[1]
    logits_TW = logits_TW.float()
    largest_T = logits_TW.max(dim=1).values
    if group.size() > 1:
        dist.all_reduce(largest_T, op=dist.ReduceOp.MAX, group=group)
    local_T = labels_T - group.rank() * width
    elsewhere_T = (local_T < 0) | (local_T >= width)
    return logits_TW - largest_T[:, None], largest_T, local_T.masked_fill(elsewhere_T, 0), elsewhere_T


class _VocabularyParallelLogprob(torch.autograd.Function):
    """log softmax(logits)[label], with two all-reduces of [T] instead of gathering logits."""

    @staticmethod
    def forward(ctx: Any, logits_TW: torch.Tensor, labels_T: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        shifted_TW, _largest_T, local_T, elsewhere_T = _shifted(logits_TW, labels_T, group)
        picked_T = shifted_TW.gather(1, local_T[:, None])[:, 0].masked_fill(elsewhere_T, 0.0)
        exponent_TW = shifted_TW.exp_()
        sums_2T = torch.stack((exponent_TW.sum(1), picked_T))
        if group.size() > 1:
            dist.all_reduce(sums_2T, group=group)
        total_T, picked_T = sums_2T
        softmax_TW = exponent_TW.div_(total_T[:, None])
        ctx.save_for_backward(softmax_TW, local_T, elsewhere_T)
        return picked_T - total_T.log()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        softmax_TW, local_T, elsewhere_T = ctx.saved_tensors
        grad_T = grads[0]
        grad_TW = -softmax_TW * grad_T[:, None]
        here_T = torch.where(elsewhere_T, torch.zeros_like(grad_T), grad_T)
        grad_TW.scatter_add_(1, local_T[:, None], here_T[:, None])
        return grad_TW, None, None


def token_logprobs(logits_TW: Logits, labels_T: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Log-probability of each label, fp32 [T], the same on every rank of `group`.

    Args:
        logits_TW: this rank's part of the logits, of any floating type, or what they are computed from; rank r holds
            ids r * W to (r + 1) * W - 1.
        labels_T: int64 token ids.
        group: the ranks that share the vocabulary (tensor parallel).
    """
    if isinstance(logits_TW, ProjectedLogits):
        return over_chunks(functools.partial(token_logprobs, group=group), logits_TW, labels_T)
    logprobs: torch.Tensor = _VocabularyParallelLogprob.apply(logits_TW, labels_T, group)
    return logprobs


class _VocabularyParallelStatistics(torch.autograd.Function):
    """[3, T]: log softmax(logits)[label], its mean over the vocabulary, and the logarithm of softmax's denominator."""

    @staticmethod
    def forward(
        ctx: Any, logits_TW: torch.Tensor, labels_T: torch.Tensor, vocabulary_size: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        shifted_TW, largest_T, local_T, elsewhere_T = _shifted(logits_TW, labels_T, group)
        picked_T = shifted_TW.gather(1, local_T[:, None])[:, 0].masked_fill(elsewhere_T, 0.0)
        # Ids beyond the vocabulary, which only fill up the shards, are no part of the mean.
        width = logits_TW.shape[1]
        num_real = min(max(vocabulary_size - group.rank() * width, 0), width)
        mean_T = shifted_TW[:, :num_real].sum(1) / vocabulary_size
        exponent_TW = shifted_TW.exp_()
        sums_3T = torch.stack((exponent_TW.sum(1), picked_T, mean_T))
        if group.size() > 1:
            dist.all_reduce(sums_3T, group=group)
        total_T, picked_T, mean_T = sums_3T
        ctx.save_for_backward(exponent_TW.div_(total_T[:, None]), local_T, elsewhere_T)
        ctx.num_real, ctx.vocabulary_size = num_real, vocabulary_size
        log_total_T = total_T.log()
        return torch.stack((picked_T - log_total_T, mean_T - log_total_T, largest_T + log_total_T))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        softmax_TW, local_T, elsewhere_T = ctx.saved_tensors
        picked_grad_T, mean_grad_T, normaliser_grad_T = grads[0]
        grad_TW = softmax_TW * (normaliser_grad_T - picked_grad_T - mean_grad_T)[:, None]
        grad_TW[:, : ctx.num_real] += mean_grad_T[:, None] / ctx.vocabulary_size
        here_T = torch.where(elsewhere_T, torch.zeros_like(picked_grad_T), picked_grad_T)
        grad_TW.scatter_add_(1, local_T[:, None], here_T[:, None])
        return grad_TW, None, None, None


def token_statistics(
    logits_TW: Logits, labels_T: torch.Tensor, vocabulary_size: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What label smoothing and the z-loss read, three times fp32 [T], the same on every rank of `group`.

    Args:
        logits_TW: this rank's part of the logits, of any floating type, or what they are computed from; rank r holds
            ids r * W to (r + 1) * W - 1.
        labels_T: int64 token ids.
        vocabulary_size: number of ids in the mean, in all ranks together; those from it on are filling.
        group: the ranks that share the vocabulary (tensor parallel).

    Returns:
        Log-probability of each label, mean log-probability over the vocabulary, and log of the sum of exp(logits).
    """

    def statistics(part_TW: torch.Tensor, of_T: torch.Tensor) -> torch.Tensor:
        figures: torch.Tensor = _VocabularyParallelStatistics.apply(part_TW, of_T, vocabulary_size, group)
        return figures

    if isinstance(logits_TW, ProjectedLogits):
        figures_3T = over_chunks(statistics, logits_TW, labels_T)
    else:
        figures_3T = statistics(logits_TW, labels_T)
    logprobs_T, means_T, normalisers_T = figures_3T.unbind(0)
    return logprobs_T, means_T, normalisers_T
