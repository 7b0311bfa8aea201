"""Rank arithmetic of every placement, without any process."""

import itertools
import math

import pytest

from megavlm.config.schema import ParallelConfig
from megavlm.parallel.topology import Coordinates, Topology, everyone_once, topology_of

TOPOLOGIES = [
    Topology(tensor, context, data, pipeline, placement, vision_tensor, stages, vision_data)
    for tensor, context, data, pipeline in itertools.product((1, 2), (1, 2), (1, 3), (1, 2))
    for placement, stages, vision_data in (
        ("first_stage", 1, 0),
        ("stage", 1, 0),
        ("stage", 2, 0),
        ("spread", 1, 0),
        ("bubble", 1, 0),
        ("own_ranks", 1, 2),
    )
    for vision_tensor in {1, tensor}
]


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_every_rank_has_one_place(topology: Topology) -> None:
    places = [topology.coordinates(rank) for rank in range(topology.world_size)]
    language = [place for place in places if place is not None]
    assert len(set(language)) == len(language) == topology.layer_size * topology.pipeline
    for rank, place in enumerate(places):
        position = topology.position(rank)
        assert 0 <= position < topology.num_positions
        if place is None:
            assert position < topology.first_position and topology.replica_of(rank) is not None
        else:
            assert topology.language_rank(place) == rank
            assert position == topology.first_position + place.stage
            assert topology.loading_data_rank(rank) == place.data


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_encoders_are_complete_and_serve_everybody(topology: Topology) -> None:
    taken = [rank for replica in topology.replicas for row in replica.ranks for rank in row]
    assert len(set(taken)) == len(taken)
    for replica in topology.replicas:
        assert len(replica.ranks) == topology.vision_stages
        assert all(len(row) == topology.vision_tensor for row in replica.ranks)
        for stage, row in enumerate(replica.ranks):
            assert {topology.position(rank) for rank in row} == {replica.position + stage}
    for data in range(topology.data):
        assert topology.serving(data)
    copies = topology.encoder_copy_groups()
    assert sorted(rank for ranks in copies for rank in ranks) == sorted(taken)
    assert all(len(ranks) == len(topology.replicas) for ranks in copies)


def test_who_encodes_under_each_placement() -> None:
    def ranks(topology: Topology) -> list[tuple[tuple[int, ...], ...]]:
        return [replica.ranks for replica in topology.replicas]

    base = {"tensor": 2, "context": 1, "data": 2, "pipeline": 2}
    assert ranks(Topology(**base, placement="first_stage", vision_tensor=2)) == [((0, 1),), ((2, 3),)]
    assert ranks(Topology(**base, placement="first_stage", vision_tensor=1)) == [((0,),), ((1,),), ((2,),), ((3,),)]
    assert ranks(Topology(**base, placement="bubble", vision_tensor=2)) == [
        ((0, 1),),
        ((2, 3),),
        ((4, 5),),
        ((6, 7),),
    ]
    staged = Topology(**base, placement="stage", vision_tensor=2, vision_stages=2)
    assert ranks(staged) == [((0, 1), (4, 5)), ((2, 3), (6, 7))]
    assert staged.language_rank(Coordinates(0, 0, 0, 0)) == 8
    own = Topology(**base, placement="own_ranks", vision_tensor=3, vision_data=2)
    assert ranks(own) == [((0, 1, 2),), ((3, 4, 5),)] and own.world_size == 14
    assert [replica.data for replica in own.replicas] == [None, None]


def test_groups_are_megatrons() -> None:
    topology = Topology(tensor=2, context=2, data=1, pipeline=2)
    assert topology.language_groups("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert topology.language_groups("context") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert topology.language_groups("stage") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert topology.language_groups("tensor", "stage") == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert topology.embedding_groups() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_from_a_recipe() -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=3,
        vision_placement="stage",
        vision_pipeline_model_parallel_size=2,
    )
    topology = topology_of(parallel, 12)
    assert (topology.pipeline, topology.vision_stages, topology.data, topology.vision_tensor) == (1, 2, 2, 2)
    own = topology_of(ParallelConfig(vision_placement="own_ranks", vision_data_parallel_size=2), 5)
    assert (own.data, own.num_own_ranks, own.vision_tensor) == (3, 2, 1)


def test_everyone_once() -> None:
    assert everyone_once([[1, 2]], 4) == [[1, 2], [0], [3]]


@pytest.mark.parametrize(("expert", "expert_tensor"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (6, 2)])
def test_experts_have_a_grid_of_their_own(expert: int, expert_tensor: int) -> None:
    topology = Topology(2, 2, 3, 2, "own_ranks", 1, 1, 2, expert, expert_tensor)
    language = list(range(2, topology.world_size))
    num_copies = topology.layer_size // (expert * expert_tensor)
    sizes = {"tensor": expert_tensor, "expert": expert, "copy": num_copies, "stage": 2}
    for number in (1, 2, 3):
        for axes in itertools.combinations(sizes, number):
            groups = topology.expert_groups(*axes)
            assert sorted(rank for ranks in groups for rank in ranks) == language
            assert {len(ranks) for ranks in groups} == {math.prod(sizes[axis] for axis in axes)}
    for ranks in topology.expert_groups("tensor", "expert", "copy"):  # those of a stage
        assert len({topology.position(rank) for rank in ranks}) == 1
    for ranks in topology.expert_groups("tensor"):  # parts of an expert are neighbours, as tensor ranks are
        assert ranks == list(range(ranks[0], ranks[0] + expert_tensor))


def test_experts_without_parallelism_of_their_own_are_copied_like_the_rest() -> None:
    topology = Topology(2, 2, 3, 2)
    assert sorted(topology.expert_groups("copy")) == sorted(topology.language_groups("data", "context"))
    assert sorted(topology.expert_groups("tensor")) == sorted(topology.language_groups("tensor"))
