"""Process groups of a run: those of the language model, and those of the vision encoder.

Groups are handed to every module as arguments. Megatron-Core's `parallel_state` is told about them as well, because
parts of it still fall back to that.
"""

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megavlm.config.schema import ParallelConfig
from megavlm.parallel.topology import Coordinates, Topology, everyone_once, topology_of
from megavlm.platform import megatron_compat


@dataclass(frozen=True)
class Groups:
    """Everything a rank belongs to.

    `language` and `vision` are what Megatron-Core modules take as `pg_collection`. On a rank that holds no language
    model (or no encoder) their groups hold the rank alone.
    """

    topology: Topology
    language: ProcessGroupCollection
    vision: ProcessGroupCollection
    self_only: dist.ProcessGroup

    @property
    def tensor(self) -> dist.ProcessGroup:
        """Tensor-parallel group of the language model."""
        return self.language.tp

    @property
    def context(self) -> dist.ProcessGroup:
        """Context-parallel group of the language model."""
        return self.language.cp

    @property
    def pipeline(self) -> dist.ProcessGroup:
        """Pipeline group of the language model."""
        return self.language.pp

    @property
    def data(self) -> dist.ProcessGroup:
        """Data-parallel group of the language model, without context parallelism."""
        return self.language.dp

    @property
    def data_context(self) -> dist.ProcessGroup:
        """Ranks that hold the same part of the language model and see different tokens."""
        return self.language.dp_cp

    @property
    def place(self) -> Coordinates | None:
        """This rank in the language model's grid; None: it only encodes."""
        return self.topology.coordinates(dist.get_rank())

    @property
    def position(self) -> int:
        """This rank's list in a schedule."""
        return self.topology.position(dist.get_rank())

    @property
    def has_encoder(self) -> bool:
        """Whether this rank holds (a part of) the vision encoder."""
        return self.topology.replica_of(dist.get_rank()) is not None

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.place is not None and self.place.stage == self.topology.pipeline - 1

    @property
    def speaks(self) -> bool:
        """Whether this rank's loss is counted: on the last stage one of the tensor ranks, which all have the same."""
        return self.is_last_stage and self.place is not None and self.place.tensor == 0


def join_world(timeout_s: int) -> None:
    """Join the job that torchrun describes in the environment; alone when there is none."""
    if dist.is_initialized():
        return
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "nccl"  # the CPU platform reads this as gloo
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def initialize(parallel: ParallelConfig) -> Groups:
    """Make the groups of a layout. Every rank of the world calls this with the same layout."""
    topology = topology_of(parallel, dist.get_world_size())
    maker = _Maker(dist.get_world_size())
    self_only = maker.own([])
    language = _language_groups(topology, maker, self_only)
    # Of the same ranks perhaps, but other groups: ranks may reduce the gradients of both in different orders.
    vision = _vision_groups(topology, _Maker(dist.get_world_size()), self_only)
    groups = Groups(topology, language, vision, self_only)
    # Custom layouts of layers ask parallel_state for the pipeline rank: of the part that this rank holds.
    part = vision if groups.place is None else language
    virtual = parallel.virtual_pipeline_model_parallel_size
    megatron_compat.set_parallel_state(part, virtual if virtual > 1 else None)
    return groups


class _Maker:
    """Makes groups, each set of ranks once."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._made: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def own(self, groups: Sequence[Sequence[int]]) -> dist.ProcessGroup:
        """This rank's group out of some that every rank of the world names alike; alone where it is in none."""
        mine: dist.ProcessGroup | None = None
        for ranks in everyone_once(groups, self._world_size):
            key = tuple(ranks)
            if key not in self._made:
                self._made[key] = dist.new_group(list(ranks))
            if dist.get_rank() in ranks:
                mine = self._made[key]
        assert mine is not None
        return mine


def _language_groups(topology: Topology, maker: _Maker, self_only: dist.ProcessGroup) -> ProcessGroupCollection:
    data_context = maker.own(topology.language_groups("data", "context"))
    expert_copies = maker.own(topology.expert_groups("copy"))
    model = maker.own(topology.language_groups("tensor", "stage"))
    everybody = maker.own([list(range(topology.num_own_ranks, topology.world_size))])
    return ProcessGroupCollection(
        tp=maker.own(topology.language_groups("tensor")),
        cp=maker.own(topology.language_groups("context")),
        tp_cp=maker.own(topology.language_groups("tensor", "context")),
        dp=maker.own(topology.language_groups("data")),
        dp_cp=data_context,
        intra_dp_cp=data_context,
        tp_dp_cp=maker.own(topology.language_groups("tensor", "data", "context")),
        pp=maker.own(topology.language_groups("stage")),
        mp=model,
        embd=maker.own(topology.embedding_groups()),
        pos_embd=self_only,
        ep=maker.own(topology.expert_groups("expert")),
        expt_tp=maker.own(topology.expert_groups("tensor")),
        tp_ep=maker.own(topology.expert_groups("tensor", "expert")),
        tp_ep_pp=maker.own(topology.expert_groups("tensor", "expert", "stage")),
        expt_dp=expert_copies,
        intra_expt_dp=expert_copies,
        intra_dist_opt=everybody,
    )


def _vision_groups(topology: Topology, maker: _Maker, self_only: dist.ProcessGroup) -> ProcessGroupCollection:
    copies = maker.own(topology.encoder_copy_groups())
    tensor = maker.own(topology.encoder_tensor_groups())
    return ProcessGroupCollection(
        tp=tensor,
        cp=self_only,
        tp_cp=tensor,
        dp=copies,
        dp_cp=copies,
        intra_dp_cp=copies,
        tp_dp_cp=maker.own([[rank for replica in topology.replicas for row in replica.ranks for rank in row]]),
        pp=maker.own(topology.encoder_stage_groups()),
        mp=tensor,
        embd=self_only,
        pos_embd=self_only,
        ep=self_only,
        expt_tp=self_only,
        tp_ep=self_only,
        tp_ep_pp=tensor,
        expt_dp=copies,
        intra_expt_dp=copies,
        intra_dist_opt=copies,
    )


def destroy() -> None:
    """Forget the layout, so that another one can be made in the same processes (tests)."""
    megatron_compat.clear_parallel_state()
