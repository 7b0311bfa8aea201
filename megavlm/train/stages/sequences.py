"""From a packed row's outputs to one number for each of its sequences, over context-parallel ranks.

Shape suffixes: T tokens of the whole row, L of this context-parallel rank, Q sequences of the row (the padding at its
end left out), N samples, P samples that count, X numbers of a token's output.
"""

import itertools

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


def sequence_rows(outputs_LX: torch.Tensor, places_Q: torch.Tensor, batch: Batch, groups: Groups) -> torch.Tensor:
    """The outputs of one token of each sequence, fp32 [Q, X], the same on every context rank.

    Args:
        outputs_LX: of this rank's tokens.
        places_Q: int64 position of each token in the packed row.
        batch: the row.
        groups: process groups.
    """
    context = groups.context
    sequences_T = torch.full((len(batch.tokens_T),), -1)
    sequences_T[places_Q] = torch.arange(len(places_Q))
    sequences_L = local_part(sequences_T, batch.cu_seqlens, context.size(), context.rank()).to(outputs_LX.device)
    held = torch.nonzero(sequences_L >= 0)[:, 0]
    rows_QX = torch.zeros(len(places_Q), outputs_LX.shape[1], device=outputs_LX.device)
    return summed_over_context(rows_QX.index_add(0, sequences_L[held], outputs_LX[held].float()), context)


def last_wanted_tokens(wanted_T: torch.Tensor, batch: Batch, first: int = 0, count: int = -1) -> torch.Tensor:
    """Position in the packed row of the last wanted token of each sequence: int64 [Q].

    In a row that only fills up a round none is wanted, and any will do.

    Args:
        wanted_T: bool, or a number that is not 0.
        batch: the row.
        first: of the sequences that are looked at.
        count: how many they are; -1: those of the samples.
    """
    num = num_sequences(batch) if count < 0 else count
    borders = batch.cu_seqlens[first : first + num + 1].tolist()
    places = [torch.nonzero(wanted_T[start:end])[:, 0].tolist() or [0] for start, end in itertools.pairwise(borders)]
    return torch.tensor([start + place[-1] for start, place in zip(borders, places, strict=False)])


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
