"""Weighted next-token cross entropy.

Shape suffixes: T tokens of this rank, W this rank's part of the vocabulary.
"""

import torch
import torch.distributed as dist

from megavlm.losses.chunked import Logits
from megavlm.losses.logprob import token_logprobs, token_statistics


def cross_entropy(
    logits_TW: Logits, labels_T: torch.Tensor, weights_T: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """-sum_t weight_t log p(label_t).

    Args:
        logits_TW: sharded logits, or what they are computed from.
        labels_T: int64 ids of the tokens to predict.
        weights_T: fp32 weight of each prediction; 0 for prompts and padding.
        group: tensor-parallel group.

    Returns:
        The sum, the sum of weights that it is to be divided by (once, over the whole global batch), and no metrics.
    """
    loss_sum = -(token_logprobs(logits_TW, labels_T, group) * weights_T).sum()
    return loss_sum, weights_T.sum(), {}


def regularised_cross_entropy(
    logits_TW: Logits,
    labels_T: torch.Tensor,
    weights_T: torch.Tensor,
    group: dist.ProcessGroup,
    vocabulary_size: int,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Cross entropy with label smoothing (arXiv 1512.00567, section 7) and z-loss (PaLM, arXiv 2204.02311, section 5).

    sum_t weight_t * (-(1 - s) log p(label_t) - s mean_v log p(v) + z log(sum_v exp(logit_v))^2)

    Args:
        logits_TW: sharded logits, or what they are computed from.
        labels_T: int64 ids of the tokens to predict.
        weights_T: fp32 weight of each prediction; 0 for prompts and padding.
        group: tensor-parallel group.
        vocabulary_size: number of token ids; logits from it on only fill up the shards.
        label_smoothing: s, the share of a label that is spread evenly over all token ids, as torch defines it.
        z_loss_weight: z; PaLM's is 1e-4.

    Returns:
        As `cross_entropy`; metrics: the sums of the negative log-likelihood and of log(sum of exp(logits))^2.
    """
    losses_T, nll_T, squares_T = regularised_token_losses(
        logits_TW, labels_T, group, vocabulary_size, label_smoothing, z_loss_weight
    )
    metrics = {"nll": (nll_T * weights_T).detach().sum(), "z": (squares_T * weights_T).detach().sum()}
    return (losses_T * weights_T).sum(), weights_T.sum(), metrics


def regularised_token_losses(
    logits_TW: Logits,
    labels_T: torch.Tensor,
    group: dist.ProcessGroup,
    vocabulary_size: int,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `regularised_cross_entropy` adds up, of every token and without its weight: three times fp32 [T].

    Returns:
        The loss, -log p(label), and log(sum_v exp(logit_v))^2.
    """
    logprobs_T, means_T, normalisers_T = token_statistics(logits_TW, labels_T, vocabulary_size, group)
    smoothed_T = (1 - label_smoothing) * logprobs_T + label_smoothing * means_T
    squares_T = normalisers_T**2
    return z_loss_weight * squares_T - smoothed_T, -logprobs_T, squares_T
