"""Data parallelism: Megatron-Core's DDP around model chunks."""

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.config.schema import ParallelConfig
from megavlm.parallel.groups import Groups

_wrapped: list[DistributedDataParallel] = []

# With overlap, gradients travel bucket by bucket; one bucket otherwise.
OVERLAP_BUCKET_PARAMETERS = 40_000_000


def wrap_chunks(
    chunks: Sequence[MegatronModule],
    config: TransformerConfig,
    parallel: ParallelConfig,
    groups: Groups,
    bucket_size: int = OVERLAP_BUCKET_PARAMETERS,
) -> list[DistributedDataParallel]:
    """Wrap every chunk, and start all data ranks from the same weights.

    Gradients are summed (not averaged) over data ranks, in fp32.
    """
    overlap = parallel.overlap_grad_reduce
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=overlap,
        overlap_param_gather=parallel.overlap_param_gather,
        grad_reduce_in_fp32=config.params_dtype != torch.float32,
        average_in_collective=False,
        bucket_size=bucket_size if overlap else None,
    )
    wrapped = [
        DistributedDataParallel(config, settings, chunk, disable_bucketing=number > 0, pg_collection=groups.language)
        for number, chunk in enumerate(chunks)
    ]
    _wrapped.extend(wrapped)
    for chunk in wrapped:
        chunk.broadcast_params()
    if overlap:
        no_syncs = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_syncs if len(no_syncs) > 1 else no_syncs[0]
        if parallel.overlap_param_gather:
            starts = [chunk.start_param_sync for chunk in wrapped]
            config.param_sync_func = starts if len(starts) > 1 else starts[0]
    return wrapped


def release() -> None:
    """Let go of wrapped chunks that are no longer used, when a process builds several models after each other (tests).

    DDP's gradient hooks hold it from inside autograd's C++ nodes, which its parameters hold: a cycle that Python's
    collector cannot see. It would keep the process groups, and hundreds of gloo threads, alive for ever. So the wrapped
    chunks are emptied; the parameters themselves stay behind.
    """
    for chunk in _wrapped:
        vars(chunk).clear()
    _wrapped.clear()
