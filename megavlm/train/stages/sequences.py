"""From a packed row's outputs to one number for each of its sequences, over context-parallel ranks.

Shape suffixes: T tokens of the whole row, L of this context-parallel rank, Q sequences of the row (the padding at its
end left out), N samples, P samples that count.
"""

import torch

from megavlm.data.sample import Batch
from megavlm.losses.sequences import samples_of_tokens, sums_per_sample
from megavlm.parallel.context import local_part, summed_over_context
from megavlm.parallel.groups import Groups


def sequence_sums(values_L: torch.Tensor, batch: Batch, groups: Groups) -> torch.Tensor:
    """Sum of a value over the tokens of each sequence, fp32 [Q], the same on every context rank.

    Args:
        values_L: of this rank's tokens.
        batch: the row.
        groups: process groups.
    """
    context = groups.context
    samples_T = samples_of_tokens(batch.cu_seqlens)
    samples_L = local_part(samples_T, batch.cu_seqlens, context.size(), context.rank()).to(values_L.device)
    sums = summed_over_context(sums_per_sample(values_L, samples_L, len(batch.cu_seqlens) - 1), context)
    return sums[: num_sequences(batch)]


def predicts_answer(batch: Batch) -> torch.Tensor:
    """Whether the token after each one is learned, whatever its weight: bool [T]."""
    return batch.loss_weights_T > 0


def num_sequences(batch: Batch) -> int:
    """Q."""
    return len(batch.sample_ids) * batch.num_parts


def counting_samples(batch: Batch) -> torch.Tensor:
    """Numbers of the samples that count, int64 [P]: all, or none in a row that only fills up a round."""
    firsts_N = batch.cu_seqlens[: num_sequences(batch) : batch.num_parts].long()
    return torch.nonzero(batch.real_T[firsts_N])[:, 0]
