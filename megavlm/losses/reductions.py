"""What a loss is a mean over: tokens, samples, or between the two.

Shape suffixes: T tokens of a packed row, S samples in it.
"""

from typing import Literal

import torch

from megavlm.errors import use_error
from megavlm.losses.sequences import samples_of_tokens, sums_per_sample

# The power of a sample's number of learnt tokens that its tokens' weights are divided by.
REDUCTION_POWERS: dict[str, float] = {"token": 0.0, "square": 0.5, "sample": 1.0}


def reduced_weights(
    weights_T: torch.Tensor, cu_seqlens: torch.Tensor, reduction: Literal["token", "square", "sample"]
) -> torch.Tensor:
    """Weights of tokens such that sum(weight * loss) / sum(weight), over the global batch, is the mean asked for.

    `token`: every token counts the same, long answers most. `sample`: every sample counts the same. `square`: a
    sample counts by the square root of its length; InternVL 2.5, arXiv 2412.05271, "square averaging".
    A sample's length is the number of its tokens with a weight above 0, so that weights of rows stay what they are.

    Args:
        weights_T: fp32 weight of each token, 0 for what is not learnt; of the whole row, before context parallelism
            cuts it.
        cu_seqlens: sample borders, from 0 to T.
        reduction: one of `REDUCTION_POWERS`.

    Returns:
        fp32 [T]; `weights_T` itself for `token`.

    Raises:
        UseError: an unknown reduction.
    """
    if reduction not in REDUCTION_POWERS:
        raise use_error("loss_reduction", reduction, f"one of {', '.join(REDUCTION_POWERS)}", "name one of them")
    if reduction == "token":
        return weights_T
    samples_T = samples_of_tokens(cu_seqlens)
    lengths_S = sums_per_sample(weights_T > 0, samples_T, len(cu_seqlens) - 1)
    return weights_T / lengths_S.clamp(min=1)[samples_T] ** REDUCTION_POWERS[reduction]
