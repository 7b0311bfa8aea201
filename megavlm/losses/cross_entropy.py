"""Weighted next-token cross entropy.

Shape suffixes: T tokens of this rank, W this rank's part of the vocabulary.
"""

import torch
import torch.distributed as dist

from megavlm.losses.logprob import token_logprobs


def cross_entropy(
    logits_TW: torch.Tensor, labels_T: torch.Tensor, weights_T: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """-sum_t weight_t log p(label_t).

    Args:
        logits_TW: sharded logits.
        labels_T: int64 ids of the tokens to predict.
        weights_T: fp32 weight of each prediction; 0 for prompts and padding.
        group: tensor-parallel group.

    Returns:
        The sum, the sum of weights that it is to be divided by (once, over the whole global batch), and no metrics.
    """
    loss_sum = -(token_logprobs(logits_TW, labels_T, group) * weights_T).sum()
    return loss_sum, weights_T.sum(), {}
