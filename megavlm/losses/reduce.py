"""The one division: sums and counts of a whole global batch become a mean.

Stages return sums and counts per microbatch. Gradients of the sum are accumulated over microbatches and ranks, and
divided by the global count, so that microbatch size, data and context parallelism never change the objective.
"""

import torch
import torch.distributed as dist


def global_sums(local: torch.Tensor, counts: bool) -> torch.Tensor:
    """Add up sums and counts over the ranks that saw different tokens; every rank of the world calls this.

    Args:
        local: vector or matrix, in float64 where what is added up has different sizes.
        counts: whether this rank's is counted: one of the ranks that computed the same loss.

    Returns:
        The sum, on every rank.
    """
    total = local.clone() if counts else torch.zeros_like(local)
    dist.all_reduce(total)
    return total
