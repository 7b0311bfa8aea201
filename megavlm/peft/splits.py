"""How tensor-parallel ranks share what an adapter learns for a linear: marks, parts, and places in checkpoints.

An adapter has parameters for each Hugging Face projection of the linear. Those that go by outputs lie as the rows of a
column-parallel linear do, those that go by inputs as the columns of a row-parallel one; the others are on every rank.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from megavlm.peft.targets import Projection, Target, places_of

Lies = Mapping[str, Literal["by output", "by input"]]
"""Names of an adapter's parameters: whether their first dimension counts outputs, or their last one inputs."""


@dataclass(frozen=True)
class Splits:
    """Of one linear.

    Attributes:
        is_column: whether its outputs are shared out, not its inputs.
        is_expert: whether it is an expert's.
        group: the ranks.
        halves: whether its outputs have two halves that are cut separately.
        sequence_parallel: whether each rank sees a part of the tokens outside of it.
        num_inputs: that this rank has.
        num_outputs: that this rank has.
        projections: that are adapted, by name.
        places: see `places_of`.
    """

    is_column: bool
    is_expert: bool
    group: dist.ProcessGroup
    halves: bool
    sequence_parallel: bool
    num_inputs: int
    num_outputs: int
    projections: Mapping[str, Projection]
    places: torch.Tensor | None

    @property
    def spread(self) -> bool:
        """Whether there are several ranks."""
        return self.group.size() > 1

    def mark(self, modules: nn.ModuleDict, lies: Lies) -> None:
        """Say of each parameter how ranks hold it, as Megatron-Core does of its own."""
        for _, kind, parameter in _parameters(modules):
            dimension = self._split_dimension(kind, lies)
            if dimension is None:
                vars(parameter)["sequence_parallel"] = self.sequence_parallel
            else:
                set_tensor_model_parallel_attributes(parameter, True, dimension % parameter.dim(), 1)
            vars(parameter)["allreduce"] = not self.is_expert

    def _split_dimension(self, kind: str, lies: Lies) -> int | None:
        if self.is_column:
            return 0 if lies[kind] == "by output" else None
        return -1 if lies[kind] == "by input" else None

    def in_order(self, values: torch.Tensor, missing: float) -> torch.Tensor:
        """Rows of the projections, one after the other, to the linear's rows; those of no projection are `missing`."""
        if self.places is None:
            return values
        if len(values) < self.num_outputs:
            values = torch.cat((values, values.new_full((1, *values.shape[1:]), missing)))
        return values.index_select(0, self.places.to(values.device))

    def part_of(self, projection: str, kind: str, whole: torch.Tensor, lies: Lies) -> torch.Tensor:
        """This rank's part of a whole parameter."""
        size, rank = self.group.size(), self.group.rank()
        if self._split_dimension(kind, lies) is None:
            return whole
        if not self.is_column:
            return whole.chunk(size, dim=-1)[rank]
        if self.halves:
            return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
        one = self.projections[projection]
        return whole[one.start : one.start + len(one.rows)]

    def sharded(
        self,
        modules: nn.ModuleDict,
        lies: Lies,
        prefix: str,
        sharded_offsets: tuple[Any, ...],
        metadata: dict[str, Any],
    ) -> dict[str, Any]:
        """Sharded parameters for a checkpoint."""
        state: dict[str, Any] = {}
        for name, kind, parameter in _parameters(modules):
            key = f"{prefix}{name}.{kind}"
            dimension = self._split_dimension(kind, lies)
            axes = {} if dimension is None else {kind: dimension % parameter.dim()}
            (shard,) = make_sharded_tensors_for_checkpoint(
                {kind: parameter},
                f"{prefix}{name}.",
                axes,
                sharded_offsets,
                tp_group=self.group,
                dp_cp_group=metadata["dp_cp_group"],
            ).values()
            if self.is_column and dimension is not None:
                if self.halves:
                    shard = apply_swiglu_sharded_factory(shard, sharded_offsets)
                elif not self.is_expert:
                    shard = _rows_of(shard, self.projections[name])
            state[key] = shard
        return state


def splits_of(target: Target) -> Splits:
    """How ranks share a linear."""
    linear = target.linear
    is_column, num_outputs = linear.is_column, linear.output_size_per_partition
    return Splits(
        is_column=is_column,
        is_expert=target.is_expert,
        group=linear.tp_group,
        halves=target.halves,
        sequence_parallel=linear.sequence_parallel and not target.is_expert,
        num_inputs=linear.input_size_per_partition,
        num_outputs=num_outputs,
        projections={one.name: one for one in target.projections},
        places=places_of(target.projections, num_outputs),
    )


def _parameters(modules: nn.ModuleDict) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(projection, name, parameter)."""
    for projection, module in modules.items():
        for kind, parameter in module.named_parameters():
            yield projection, kind, parameter


def _rows_of(shard: ShardedTensor, projection: Projection) -> ShardedTensor:
    """Tensor-parallel ranks have parts of different sizes of a projection where they cut a group of heads."""
    assert shard.prepend_axis_num == 0
    rest = tuple(shard.local_shape[1:])
    return dataclasses.replace(
        shard,
        global_shape=(projection.num_rows, *rest),
        global_offset=(projection.start, *(0 for _ in rest)),
        axis_fragmentations=None,  # no regular grid
    )
