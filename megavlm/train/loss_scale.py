"""Scaled losses of fp16: one scale for all optimizers of all ranks, and steps that are skipped.

Megatron-Core gives each optimizer a scaler of its own, which looks at the gradients of its own ranks. Here encoder and
language model have an optimizer each, and the gradients of one come through the other: so they overflow, and are
scaled, together.

Source: Micikevicius et al., Mixed Precision Training (arXiv 1710.03740), section 3.2.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.grad_scaler import DynamicGradScaler, MegatronGradScaler
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer


def scaler_of(optimizer: ChainedOptimizer) -> MegatronGradScaler | None:
    """What scales the loss; None where it is not scaled. Those of all optimizers are in the same state."""
    return next(iter(_scalers(optimizer)), None)


def prepare_gradients(optimizer: ChainedOptimizer) -> bool:
    """Bring gradients to their optimizers, divided by the loss's scale; every rank calls this.

    Returns:
        Whether one of any rank is infinite or NaN although a smaller scale might do: the step has to be skipped. Scales
        are halved, or in time doubled, accordingly.
    """
    if scaler_of(optimizer) is None:
        optimizer.prepare_grads()
        return False
    overflows = [_unscale(inner) for inner in optimizer.chained_optimizers]
    found = torch.tensor(float(any(overflows)), device=torch.cuda.current_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    skips = bool(found) and _can_fall(optimizer)
    for scaler in _scalers(optimizer):
        scaler.update(bool(found))
    return skips


def scaler_state(optimizer: ChainedOptimizer) -> dict[str, Any]:
    """For checkpoints; empty without a scaler."""
    scaler = scaler_of(optimizer)
    if scaler is None:
        return {}
    return {name: _plain(value) for name, value in scaler.state_dict().items()}


def restore_scalers(optimizer: ChainedOptimizer, state: dict[str, Any]) -> None:
    """Go on with a saved scale; without one it begins anew (the run had another precision)."""
    if not state:
        return
    for scaler in _scalers(optimizer):
        scaler.load_state_dict(state | {"scale": torch.tensor([state["scale"]], dtype=torch.float32)})


def _scalers(optimizer: ChainedOptimizer) -> list[MegatronGradScaler]:
    return [
        inner.grad_scaler
        for inner in optimizer.chained_optimizers
        if isinstance(inner, MixedPrecisionOptimizer) and inner.grad_scaler is not None
    ]


def _unscale(inner: MegatronOptimizer) -> bool:
    """What `prepare_grads` does (megatron-core 0.16.1 and 0.19.2), but for the scaler's update."""
    assert isinstance(inner, MixedPrecisionOptimizer)
    with torch.no_grad():
        if not inner.is_stub_optimizer:
            inner._copy_model_grads_to_main_grads()
        overflows: bool = inner._unscale_main_grads_and_check_for_nan()
    return overflows


def _can_fall(optimizer: ChainedOptimizer) -> bool:
    """Whether the scale is above its least value; one that is constant, or at it, cannot mend an overflow."""
    scaler = scaler_of(optimizer)
    return isinstance(scaler, DynamicGradScaler) and bool(scaler.scale > scaler.min_scale)


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, torch.Tensor) else value
