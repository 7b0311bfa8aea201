"""Rank arithmetic: which rank holds which part of the model, and which ranks belong together.

The language model is a grid of tensor x context x data x pipeline ranks, numbered in Megatron-Core's order: tensor
fastest, then context, data, pipeline. Experts have a grid of their own over the ranks of a stage: tensor fastest, then
expert, then copies. The vision encoder is a list of `Replica`s: complete encoders, each on its
tensor-parallel ranks and, where its layers are split, on several stages. Where a replica lies, and whose images it
encodes, depends on the placement.

A rank's `position` is its place in a pipeline schedule: ranks of one position execute the same list of actions.

Index letters: T tensor, C context, D data, S pipeline stages of the language model, V encoder stages in series.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from megavlm.config.layout import language_pipeline_size
from megavlm.config.schema import ParallelConfig


@dataclass(frozen=True)
class Coordinates:
    """A rank's place in the language model's grid."""

    tensor: int
    context: int
    data: int
    stage: int


@dataclass(frozen=True)
class Replica:
    """One complete vision encoder.

    Attributes:
        number: its index among all replicas.
        position: schedule position of its first stage.
        ranks: global ranks by [stage in series][tensor-parallel rank].
        data: the data rank whose images it encodes; None: it takes a share of everybody's.
    """

    number: int
    position: int
    ranks: tuple[tuple[int, ...], ...]
    data: int | None

    @property
    def last_position(self) -> int:
        """Schedule position of its last stage, where the features come out."""
        return self.position + len(self.ranks) - 1


@dataclass(frozen=True)
class Topology:
    """The layout of a run in numbers; everything else follows.

    Attributes:
        tensor: T.
        context: C.
        data: D.
        pipeline: S.
        placement: `vision_placement` of the recipe.
        vision_tensor: tensor-parallel ranks of a replica.
        vision_stages: V; 1 unless the placement is `stage`.
        vision_data: replicas of the placement `own_ranks`; 0 otherwise.
        expert: ranks that share the experts of a layer.
        expert_tensor: ranks that share the matrices of an expert; 0: as `tensor`.
    """

    tensor: int
    context: int
    data: int
    pipeline: int
    placement: str = "first_stage"
    vision_tensor: int = 1
    vision_stages: int = 1
    vision_data: int = 0
    expert: int = 1
    expert_tensor: int = 0

    @property
    def num_own_ranks(self) -> int:
        """Ranks in front of the language model's grid that hold nothing but the encoder."""
        if self.placement == "own_ranks":
            return self.vision_tensor * self.vision_data
        return self.vision_stages * self.layer_size if self.placement == "stage" else 0

    @property
    def layer_size(self) -> int:
        """Ranks of one pipeline position: T x C x D."""
        return self.tensor * self.context * self.data

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.num_own_ranks + self.layer_size * self.pipeline

    @property
    def first_position(self) -> int:
        """Schedule position of the language model's first stage."""
        if self.placement == "own_ranks":
            return 1
        return self.vision_stages if self.placement == "stage" else 0

    @property
    def num_positions(self) -> int:
        """Positions of a schedule."""
        return self.first_position + self.pipeline

    def language_rank(self, place: Coordinates) -> int:
        """Global rank of a place in the language model's grid."""
        inner = place.data + self.data * place.stage
        return self.num_own_ranks + place.tensor + self.tensor * (place.context + self.context * inner)

    def coordinates(self, rank: int) -> Coordinates | None:
        """Place of a rank in the language model's grid; None for a rank that only encodes."""
        return None if rank < self.num_own_ranks else self._place(rank - self.num_own_ranks)

    def _place(self, number: int) -> Coordinates:
        number, tensor = divmod(number, self.tensor)
        number, context = divmod(number, self.context)
        stage, data = divmod(number, self.data)
        return Coordinates(tensor, context, data, stage)

    def position(self, rank: int) -> int:
        """Schedule position of a rank."""
        if rank >= self.num_own_ranks:
            return self.first_position + (rank - self.num_own_ranks) // self.layer_size
        return rank // self.layer_size if self.placement == "stage" else 0

    def loading_data_rank(self, rank: int) -> int:
        """The data rank whose microbatches a rank works on; 0 for a rank that encodes everybody's images."""
        place = self.coordinates(rank)
        if place is not None:
            return place.data
        return self._place(rank % self.layer_size).data if self.placement == "stage" else 0

    @functools.cached_property
    def replicas(self) -> tuple[Replica, ...]:
        """All encoders."""
        if self.placement == "own_ranks":
            size = self.vision_tensor
            return tuple(
                Replica(number, 0, (tuple(range(number * size, (number + 1) * size)),), None)
                for number in range(self.vision_data)
            )
        # In front of, or among, the grid: at every position in `starts`, one for each data and context rank, and one
        # for each tensor rank where the encoder is not split over these.
        num_splits = self.tensor // self.vision_tensor
        starts = range(self.pipeline) if self.placement in ("spread", "bubble") else range(1)
        found: list[Replica] = []
        for start in starts:
            for data in range(self.data):
                for context in range(self.context):
                    for split in range(num_splits):
                        ranks = tuple(
                            tuple(
                                split * self.vision_tensor
                                + tensor
                                + self.tensor * (context + self.context * (data + self.data * (start + stage)))
                                for tensor in range(self.vision_tensor)
                            )
                            for stage in range(self.vision_stages)
                        )
                        owner = None if self.placement == "spread" else data
                        found.append(Replica(len(found), start, ranks, owner))
        return tuple(found)

    def replica_of(self, rank: int) -> tuple[Replica, int, int] | None:
        """(replica, its stage, its tensor rank) that a rank is part of, if any."""
        return self._replica_by_rank.get(rank)

    @functools.cached_property
    def _replica_by_rank(self) -> dict[int, tuple[Replica, int, int]]:
        return {
            rank: (replica, stage, tensor)
            for replica in self.replicas
            for stage, row in enumerate(replica.ranks)
            for tensor, rank in enumerate(row)
        }

    def serving(self, data: int) -> tuple[Replica, ...]:
        """Replicas that encode images of a data rank."""
        return tuple(replica for replica in self.replicas if replica.data in (None, data))

    def language_groups(self, *axes: str) -> list[list[int]]:
        """Ranks of the language model that differ along the named axes (fields of `Coordinates`) only."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.num_own_ranks, self.world_size):
            place = self.coordinates(rank)
            assert place is not None
            key = tuple(value for name, value in vars(place).items() if name not in axes)
            groups.setdefault(key, []).append(rank)
        return list(groups.values())

    def expert_groups(self, *axes: str) -> list[list[int]]:
        """Ranks that differ along the named axes only, in the experts' own grid over the ranks of every stage.

        Axes, fastest first: `tensor` parts of an expert, `expert` parts of the set of experts, `copy` ranks that hold
        the same, `stage`.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.num_own_ranks, self.world_size):
            stage, number = divmod(rank - self.num_own_ranks, self.layer_size)
            number, tensor = divmod(number, self.expert_tensor or self.tensor)
            copy, expert = divmod(number, self.expert)
            place = {"tensor": tensor, "expert": expert, "copy": copy, "stage": stage}
            key = tuple(value for name, value in place.items() if name not in axes)
            groups.setdefault(key, []).append(rank)
        return list(groups.values())

    def embedding_groups(self) -> list[list[int]]:
        """First and last stage of every pipeline (one rank where they are the same)."""
        return [sorted({ranks[0], ranks[-1]}) for ranks in self.language_groups("stage")]

    def encoder_tensor_groups(self) -> list[list[int]]:
        """Ranks that hold parts of the same encoder layers."""
        return [list(row) for replica in self.replicas for row in replica.ranks]

    def encoder_stage_groups(self) -> list[list[int]]:
        """Ranks that hold the stages of one encoder, for each of its tensor ranks."""
        return [list(column) for replica in self.replicas for column in zip(*replica.ranks, strict=True)]

    def encoder_copy_groups(self) -> list[list[int]]:
        """Ranks that hold the same encoder weights: one group for each stage and tensor rank."""
        return [
            [replica.ranks[stage][tensor] for replica in self.replicas]
            for stage in range(self.vision_stages)
            for tensor in range(self.vision_tensor)
        ]


def topology_of(parallel: ParallelConfig, world_size: int) -> Topology:
    """The topology of a recipe's layout; the world size is known to divide (`config.fit.validate_layout`)."""
    tensor, placement = parallel.tensor_model_parallel_size, parallel.vision_placement
    own_ranks = placement == "own_ranks"
    vision_tensor = parallel.vision_tensor_model_parallel_size or (1 if own_ranks else tensor)
    own = vision_tensor * parallel.vision_data_parallel_size if own_ranks else 0
    model_ranks = tensor * parallel.context_parallel_size * parallel.pipeline_model_parallel_size
    assert (world_size - own) % model_ranks == 0 and world_size > own, (world_size, parallel)
    topology = Topology(
        tensor=tensor,
        context=parallel.context_parallel_size,
        data=(world_size - own) // model_ranks,
        pipeline=language_pipeline_size(parallel),
        placement=placement,
        vision_tensor=vision_tensor,
        vision_stages=parallel.vision_pipeline_model_parallel_size if placement == "stage" else 1,
        vision_data=parallel.vision_data_parallel_size if own_ranks else 0,
        expert=parallel.expert_model_parallel_size,
        expert_tensor=parallel.expert_tensor_parallel_size,
    )
    assert topology.world_size == world_size
    assert topology.layer_size % (topology.expert * (topology.expert_tensor or tensor)) == 0
    return topology


def everyone_once(groups: Sequence[Sequence[int]], world_size: int) -> list[list[int]]:
    """The groups, and one of its own for each rank that is in none."""
    taken = {rank for ranks in groups for rank in ranks}
    return [list(ranks) for ranks in groups] + [[rank] for rank in range(world_size) if rank not in taken]
