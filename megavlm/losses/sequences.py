"""From log-probabilities of tokens in a packed row to those of whole answers.

Shape suffixes: T tokens of the row or of a part of it, S samples of the row.
"""

import torch
import torch.nn.functional as F


def samples_of_tokens(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Number of the sample that each token of a packed row belongs to, int64 [T].

    Args:
        cu_seqlens: sample borders, from 0 to T.
    """
    lengths_S = cu_seqlens.diff().long()
    return torch.repeat_interleave(torch.arange(len(lengths_S), device=cu_seqlens.device), lengths_S)


def sums_per_sample(values_T: torch.Tensor, samples_T: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Sum of a value over each sample's tokens, fp32 [S].

    With context parallelism this is a rank's share: the sum over the ranks of the group is the sample's.

    Args:
        values_T: e.g. log-probabilities, already weighted.
        samples_T: sample of each token, of `samples_of_tokens`.
        num_samples: S.
    """
    sums_S = torch.zeros(num_samples, dtype=torch.float32, device=values_T.device)
    return sums_S.index_add(0, samples_T, values_T.float())


def length_desensitised_weights(
    answer_T: torch.Tensor, cu_seqlens: torch.Tensor, shared_lengths_S: torch.Tensor, ld_alpha: float
) -> torch.Tensor:
    """Weights of tokens in an answer's log-probability, fp32 [T]: LD-DPO, arXiv 2409.06411.

    An answer's tokens up to the length of the shorter answer of its pair count in full, those after it by `ld_alpha`:
    1 is plain DPO, 0 compares equally long beginnings.

    Args:
        answer_T: bool, tokens of answers; of the whole row, before context parallelism cuts it.
        cu_seqlens: sample borders, from 0 to T.
        shared_lengths_S: number of tokens of the shorter answer of each sample's pair.
        ld_alpha: from 0 to 1.
    """
    samples_T = samples_of_tokens(cu_seqlens)
    # One more than T, so that an empty sample at the end has a place in it.
    num_before = F.pad(answer_T.long().cumsum(0), (1, 0))
    position_T = num_before[1:] - num_before[cu_seqlens[:-1].long()][samples_T]
    tail_T = position_T > shared_lengths_S.long()[samples_T]
    return torch.where(tail_T, ld_alpha, 1.0) * answer_T
