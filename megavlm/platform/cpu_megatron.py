"""What Megatron-Core needs after its import to run on the CPU without Transformer Engine.

These touch private names, so each says the versions it was checked with, and fails loudly where a name is gone.
"""

import contextlib
import functools
import itertools
import types
from collections.abc import Callable
from typing import Any

import torch

from megavlm.platform import cpu_kernels
from megavlm.platform.adam import FusedAdam
from megavlm.platform.megatron_compat import check_version


def apply() -> None:
    """Patch `megatron.core` (0.16.1 and 0.19.2; names re-checked at each call).

    Raises:
        UseError: the installed megatron-core is outside the tested range.
        AssertionError: a name this relies on is gone.
    """
    check_version()
    _skip_fp8_state()
    _define_missing_gemm()
    _snapshot_before_async_save()
    _use_fused_adam()
    _leave_out_collectives_of_one_rank()
    _leave_out_copies()
    _use_kernels()


def _skip_fp8_state() -> None:
    """Recompute takes the Transformer Engine branch even without FP8 (`fp8 is not None`); give it a neutral one."""
    import megatron.core.tensor_parallel.random as random_state

    if random_state.HAVE_TE:
        return
    random_state.FP8GlobalStateManager = types.SimpleNamespace(
        is_fp8_enabled=lambda: False, get_fp8_recipe=lambda: None
    )
    random_state.activation_recompute_forward = lambda **kwargs: contextlib.nullcontext()
    random_state.fp8_autocast = lambda **kwargs: contextlib.nullcontext()


def _define_missing_gemm() -> None:
    """The router asks `te_general_gemm is not None`, a name that does not exist without Transformer Engine."""
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    vars(moe_utils).setdefault("te_general_gemm", None)
    assert "maybe_move_tensor_to_cpu" in vars(token_dispatcher), "megatron-core moved maybe_move_tensor_to_cpu"

    # Its own version returns early for a tensor that is on the CPU already, without the numpy conversion.
    def move_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    vars(moe_utils)["maybe_move_tensor_to_cpu"] = move_to_cpu
    vars(token_dispatcher)["maybe_move_tensor_to_cpu"] = move_to_cpu


def stage_by_copy(buckets: Any, non_blocking: bool = True) -> list[Any]:
    """Copy what an asynchronous save will write. At module level: the persistent writer pickles it."""
    return [
        (path, key, (raw, [(item, tensor.detach().clone()) for item, tensor in tensors]))
        for path, key, (raw, tensors) in buckets
    ]


def _snapshot_before_async_save() -> None:
    """Staging is `tensor.to("cpu")`, which on a CPU tensor is an alias that training would go on changing."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    assert "preload_tensors" in vars(FileSystemWriterAsync), "megatron-core moved preload_tensors"
    FileSystemWriterAsync.preload_tensors = staticmethod(stage_by_copy)


def _use_fused_adam() -> None:
    """torch's AdamW keeps `step` per tensor, on which the distributed optimizer cannot save (0.16.1)."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed_optimizer

    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam = distributed_optimizer.Adam = FusedAdam
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distributed_optimizer.HAVE_APEX_OR_TE = True
        distributed_optimizer.USING_APEX_OPTIMIZER = True


def _leave_out_collectives_of_one_rank() -> None:
    """Gloo copies buffers to scratch memory and back where one rank is all there is; NCCL does nothing, in place."""
    import megatron.core.distributed.param_and_grad_buffer as buffers

    for name, original in (
        ("dist_all_gather_func", torch.distributed.all_gather_into_tensor),
        ("dist_reduce_scatter_func", torch.distributed.reduce_scatter_tensor),
    ):
        assert vars(buffers)[name] in (original, _unless_alone(original)), f"megatron-core moved {name}"
        vars(buffers)[name] = _unless_alone(original)


@functools.cache
def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """The collective, left out where a single rank would send a tensor to itself."""

    def call(output: torch.Tensor, input: torch.Tensor, *, group: torch.distributed.ProcessGroup, **knobs: Any) -> Any:
        if group.size() == 1 and output.data_ptr() == input.data_ptr():
            return None
        return collective(output, input, group=group, **knobs)

    return call


def _leave_out_copies() -> None:
    """Of every gradient that is clipped, and in fp32 of every weight onto itself: they took as long as Adam does."""
    import megatron.core.optimizer.clip_grads as clip_grads
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.utils import local_multi_tensor_scale

    assert "multi_tensor_scale_impl" in vars(clip_grads), "megatron-core moved multi_tensor_scale_impl"
    if clip_grads.multi_tensor_scale_impl is local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = _scale
    assert "_copy_main_params_to_model_params" in vars(DistributedOptimizer), "megatron-core moved it"
    vars_of: Any = DistributedOptimizer
    vars_of._copy_main_params_to_model_params = _unless_views(vars_of._copy_main_params_to_model_params)


def _scale(_chunk_size: int, _overflow: torch.Tensor, tensor_lists: list[list[torch.Tensor]], factor: float) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        torch.mul(source, factor, out=target)


def _unless_views(copy: Callable[[Any], None]) -> Callable[[Any], None]:
    """The copy of what the optimizer has changed to the model's weights, left out where it has changed those."""

    @functools.wraps(copy)
    def call(optimizer: Any) -> None:
        if not optimizer.is_stub_optimizer and not any(optimizer.model_float16_groups):
            held = {
                bucket.param_data.untyped_storage().data_ptr() for one in optimizer.buffers for bucket in one.buckets
            }
            shards = itertools.chain(*optimizer.shard_fp32_groups)
            if all(shard.untyped_storage().data_ptr() in held for shard in shards):
                return
        copy(optimizer)

    return call


def _use_kernels() -> None:
    """RoPE and SwiGLU in few passes; what a kernel is not for goes to Megatron-Core's own functions.

    And what linears call that add gradients in their product: a module of apex, which they take for missing.
    """
    import megatron.core.fusions.fused_bias_swiglu as swiglu
    import megatron.core.models.common.embeddings.rope_utils as rope
    import megatron.core.tensor_parallel.layers as layers

    assert "_grad_accum_fusion_available" in vars(layers), "megatron-core moved the fusion of gradients"
    vars(layers)["fused_weight_gradient_mlp_cuda"] = _PRODUCTS
    for name, function in (("swiglu", cpu_kernels.swiglu), ("swiglu_back", cpu_kernels.swiglu_backward)):
        assert name in vars(swiglu), f"megatron-core moved {name}"
        vars(swiglu)[name] = function
    for name, wrap in (("_apply_rotary_pos_emb_bshd", _rotate_heads), ("_apply_rotary_pos_emb_thd", _rotate_row)):
        assert name in vars(rope), f"megatron-core moved {name}"
        vars(rope)[name] = wrap(vars(rope)[name])


_PRODUCTS = types.SimpleNamespace(wgrad_gemm_accum_fp32=cpu_kernels.add_product)


def _rotate_heads(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def call(
        t: torch.Tensor,
        freqs: torch.Tensor,
        rotary_interleaved: bool = False,
        multi_latent_attention: bool = False,
        mscale: float = 1.0,
        **knobs: Any,
    ) -> torch.Tensor:
        if rotary_interleaved or multi_latent_attention or knobs or freqs.shape[-1] != t.shape[-1]:
            return original(t, freqs, rotary_interleaved, multi_latent_attention, mscale, **knobs)
        return cpu_kernels.rotated(t, freqs, mscale)

    return call


def _rotate_row(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A packed row that has an angle for every token needs no look at its samples, where ranks do not share it."""

    @functools.wraps(original)
    def call(
        t: torch.Tensor, cu_seqlens: torch.Tensor, freqs: torch.Tensor, *, cp_group: Any, **knobs: Any
    ) -> torch.Tensor:
        if cp_group is None or cp_group.size() > 1 or len(freqs) != len(t):
            return original(t, cu_seqlens, freqs, cp_group=cp_group, **knobs)
        import megatron.core.models.common.embeddings.rope_utils as rope

        rotated: torch.Tensor = rope._apply_rotary_pos_emb_bshd(t.unsqueeze(1), freqs, **knobs)
        return rotated.squeeze(1)

    return call
