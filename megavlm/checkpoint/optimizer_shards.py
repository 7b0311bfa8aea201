"""The distributed optimizer's state as each rank holds it: nothing is gathered, and any layout can load it.

Megatron-Core's distributed optimizer gives each data rank a range of the flat buffer that all parameters lie in; of a
parameter it may be a piece that begins and ends within a row. In the file a parameter's state has the parameter's own
shape. So a piece is described as boxes, which lie in a row in memory: of a matrix the rest of the row that it begins
in, whole rows, and the beginning of the row that it ends in. Loading goes straight into the same boxes.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def flat_boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes (offset, size) that make up elements `start` up to `end` of a tensor in memory order, in that order.

    Args:
        shape: of the tensor.
        start: first element of the flattened tensor.
        end: element after the last.
    """
    if start >= end:
        return
    if not shape:
        yield (), ()
        return
    rows, row_shape = shape[0], shape[1:]
    row_numel = math.prod(row_shape)
    assert 0 <= start and end <= rows * row_numel
    first, last = -(-start // row_numel), end // row_numel  # whole rows
    if first > last:  # begins and ends within one row
        for offset, size in flat_boxes(row_shape, start - last * row_numel, end - last * row_numel):
            yield (last, *offset), (1, *size)
        return
    for offset, size in flat_boxes(row_shape, start - (first - 1) * row_numel, row_numel):
        if start < first * row_numel:
            yield (first - 1, *offset), (1, *size)
    if first < last:
        yield (first, *(0 for _ in row_shape)), (last - first, *row_shape)
    for offset, size in flat_boxes(row_shape, 0, end - last * row_numel):
        yield (last, *offset), (1, *size)


def sharded_state(inner: DistributedOptimizer, model: Mapping[str, Any]) -> dict[str, dict[str, ShardedTensor]]:
    """This rank's pieces of every parameter's fp32 value and moments; they share memory with the optimizer.

    Args:
        inner: the optimizer; it has taken a step, or `prepare_to_load` has been called, or (partly in CPU memory)
            `allocate_offloaded`.
        model: sharded weights (`native.model_state`), which say where in the whole model a parameter lies.

    Returns:
        By a parameter's number: name of a piece to the piece.
    """
    weights = {base.data: base for base in nested_values(dict(model)) if isinstance(base.data, torch.Tensor)}
    found: dict[str, dict[str, ShardedTensor]] = {}
    for number, (parameter, range_) in enumerate(_own_ranges(inner)):
        tensors = {
            name: tensor
            for name, tensor in inner._get_main_param_and_optimizer_states(parameter).items()
            if name != "step"  # follows from the number of the run's step
        }
        found[str(number)] = {
            f"{name}.{piece}": shard
            for name, tensor in tensors.items()
            for piece, shard in enumerate(_pieces(name, tensor, range_, parameter, weights[parameter]))
        }
    return found


def prepare_to_load(inner: DistributedOptimizer) -> None:
    """Have the optimizer allocate its moments, as it would in its first step."""
    if isinstance(inner.optimizer, HybridDeviceOptimizer):
        allocate_offloaded(inner.optimizer)
    else:
        assert not inner.config.use_precision_aware_optimizer, "it would hand out scaled copies, not loaded into"
    inner.load_state_dict(inner.state_dict())


def allocate_offloaded(optimizer: HybridDeviceOptimizer) -> None:
    """Give an optimizer that is partly in CPU memory the state that it has before its first step: moments of 0.

    Megatron-Core would take a step with random gradients, which changes weights and draws from the run's random state
    (0.16.1, optimizer/cpu_offloading/hybrid_optimizer.py:453).
    """
    for one in optimizer.sub_optimizers:
        for parameter in itertools.chain.from_iterable(group["params"] for group in one.param_groups):
            if one.state[parameter]:
                continue
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            step = {"step": torch.zeros((), device=parameter.device)} if isinstance(one, torch.optim.AdamW) else {}
            one.state[parameter] = step | moments
    optimizer._sync_sub_optimizers_state_to_hdo()


def let_steps_go_on(optimizer: HybridDeviceOptimizer) -> None:
    """Leave Adam's number of updates, once loaded, to the optimizers inside.

    Megatron-Core copies its own groups onto theirs before every step, the number that was loaded among them (0.16.1,
    optimizer/cpu_offloading/hybrid_optimizer.py:351): a fused Adam beside the one in CPU memory would count it anew.
    """
    for group in optimizer.param_groups:
        group.pop("step", None)


def _own_ranges(inner: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, range]]:
    """Parameters that this rank holds state of, each with the part of it (elements of the flattened parameter)."""
    for by_dtype in inner.gbuf_ranges:
        for buckets in by_dtype.values():
            for parameter, ranges in itertools.chain.from_iterable(bucket["param_map"].items() for bucket in buckets):
                yield parameter, range(ranges["param"].start, ranges["param"].end)


def _pieces(
    name: str,
    tensor: torch.Tensor,
    range_: range,
    parameter: torch.nn.Parameter,
    weight: ShardedTensor | ShardedTensorFactory,
) -> Iterator[ShardedTensor]:
    """A flat piece of a parameter's state as boxes of the whole model's."""
    assert tensor.numel() == len(range_)
    shards = nested_values(weight.build()) if isinstance(weight, ShardedTensorFactory) else [weight]
    for shard in shards:
        # A factory (a gated MLP's: gate and up lie apart in the whole model) makes views of the parameter.
        assert shard.data.is_contiguous() and shard.data.untyped_storage()._cdata == parameter.untyped_storage()._cdata
        at = shard.data.storage_offset() - parameter.storage_offset()
        start, end = max(range_.start - at, 0), min(range_.stop - at, shard.data.numel())
        position = at + start - range_.start
        for offset, size in flat_boxes(tuple(shard.data.shape), start, end):
            count = math.prod(size)
            yield _box(f"optimizer.state.{name}.{shard.key}", tensor[position : position + count], shard, offset, size)
            position += count


def _box(
    key: str, flat: torch.Tensor, shard: ShardedTensor, offset: tuple[int, ...], size: tuple[int, ...]
) -> ShardedTensor:
    leading = shard.prepend_axis_num
    within = (*(0 for _ in range(leading)), *offset)
    assert isinstance(shard.replica_id, tuple) and len(shard.replica_id) == 3
    return ShardedTensor(
        key=key,
        data=flat.view((1,) * leading + size),
        dtype=flat.dtype,
        local_shape=(1,) * leading + size,
        global_shape=shard.global_shape,
        global_offset=tuple(a + b for a, b in zip(shard.global_offset, within, strict=True)),
        axis_fragmentations=None,  # no regular grid
        replica_id=(*shard.replica_id[:2], 0),  # the last counts data ranks, and each has a piece of its own
    )
