"""Data parallelism: Megatron-Core's DDP around the parts of the model that a rank holds."""

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.config.schema import ParallelConfig
from megavlm.parallel.groups import Groups

_wrapped: list[DistributedDataParallel] = []

# With overlap, gradients travel bucket by bucket; one bucket otherwise.
OVERLAP_BUCKET_PARAMETERS = 40_000_000


def wrap_language(
    chunks: Sequence[MegatronModule],
    config: TransformerConfig,
    parallel: ParallelConfig,
    groups: Groups,
    bucket_size: int = OVERLAP_BUCKET_PARAMETERS,
) -> list[DistributedDataParallel]:
    """Wrap the chunks of the language model, and start all data ranks from the same weights.

    Gradients are summed (not averaged) over data and context ranks, in fp32. A rank without a chunk gets an empty one:
    optimizers are made, and gradients reduced, by all ranks together.
    """
    overlap = parallel.overlap_grad_reduce
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=overlap,
        overlap_param_gather=parallel.overlap_param_gather,
        grad_reduce_in_fp32=config.params_dtype != torch.float32,
        average_in_collective=False,
        bucket_size=bucket_size if overlap else None,
        fp8_param_gather=config.fp8_param,
    )
    modules = list(chunks) or [MegatronModule(config)]
    return [_wrapped_in(config, settings, module, groups.language, number) for number, module in enumerate(modules)]


def wrap_encoder(
    encoder: MegatronModule | None,
    config: TransformerConfig,
    parallel: ParallelConfig,
    groups: Groups,
    bucket_size: int = OVERLAP_BUCKET_PARAMETERS,
) -> DistributedDataParallel:
    """Wrap this rank's encoder (an empty one where it has none): gradients are summed over all ranks with a copy.

    Overlap of the reduction is started by the runtime behind the last backward pass, not by hooks: a rank whose share
    of the images is empty runs no backward pass at all. Nor could such a rank take part in an overlapped gathering of
    parameters, which the forward pass starts.
    """
    overlap = parallel.overlap_grad_reduce
    module = MegatronModule(config) if encoder is None else encoder
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=overlap,
        overlap_param_gather=False,
        grad_reduce_in_fp32=config.params_dtype != torch.float32,
        average_in_collective=False,
        bucket_size=bucket_size if overlap else None,
        fp8_param_gather=module.config.fp8_param,
    )
    return _wrapped_in(module.config, settings, module, groups.vision, 0)


def _wrapped_in(
    config: TransformerConfig,
    settings: DistributedDataParallelConfig,
    module: MegatronModule,
    groups: ProcessGroupCollection,
    number: int,
) -> DistributedDataParallel:
    wrapped = DistributedDataParallel(config, settings, module, disable_bucketing=number > 0, pg_collection=groups)
    _wrapped.append(wrapped)
    wrapped.broadcast_params()
    return wrapped


def add_gradients_in_products(module: torch.nn.Module) -> None:
    """Have the linears of a wrapped module add a weight's gradient to that of the step while they compute it.

    What Megatron-Core calls `gradient_accumulation_fusion`: no gradient of a microbatch is written and read again.
    Linears of an unwrapped module have no gradient of a step to add to. Where Megatron-Core has found Transformer
    Engine nothing changes: it would then take a buffer of that package's, which lies on a GPU.
    """
    if layers.HAVE_TE:
        return
    for linear in module.modules():
        if isinstance(linear, ColumnParallelLinear | RowParallelLinear):
            linear.gradient_accumulation_fusion = True


def release() -> None:
    """Let go of wrapped chunks that are no longer used, when a process builds several models after each other (tests).

    DDP's gradient hooks hold it from inside autograd's C++ nodes, which its parameters hold: a cycle that Python's
    collector cannot see. It would keep the process groups, and hundreds of gloo threads, alive for ever. So the wrapped
    chunks are emptied; the parameters themselves stay behind.
    """
    for chunk in _wrapped:
        vars(chunk).clear()
    _wrapped.clear()
