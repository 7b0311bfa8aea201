"""The one division: sums and counts of a whole global batch become a mean.

Stages return sums and counts per microbatch. Gradients of the sum are accumulated over microbatches and ranks, and
divided here by the global count, so that microbatch size, data and context parallelism never change the objective.
"""

import torch
import torch.distributed as dist


def global_sums(
    local: torch.Tensor, data_context: dist.ProcessGroup, pipeline: dist.ProcessGroup, last_stage: bool
) -> torch.Tensor:
    """Add up sums and counts over the ranks that saw different tokens, known to every pipeline stage afterwards.

    Args:
        local: 1-D float64 tensor on the last pipeline stage; its content elsewhere is ignored.
        data_context: ranks with the same weights and different tokens.
        pipeline: this rank's pipeline.
        last_stage: whether this rank computed the loss.
    """
    total = local.clone() if last_stage else torch.zeros_like(local)
    dist.all_reduce(total, group=data_context)
    if pipeline.size() > 1:
        dist.broadcast(total, src=dist.get_global_rank(pipeline, pipeline.size() - 1), group=pipeline)
    return total
