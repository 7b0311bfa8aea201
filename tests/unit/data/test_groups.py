"""Rows that stay together, in every step, microbatch and pack."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.data.balance import SampleCosts, split
from megavlm.data.groups import groups_of
from megavlm.data.mixture import Mixture, Phase, Shares, Source
from megavlm.data.plan import GlobalBatchPlan
from megavlm.errors import UseError


def costs_of(num_samples, packing_length):
    generator = np.random.default_rng(num_samples)
    tokens = generator.integers(5, 25, num_samples)
    return SampleCosts(tokens, generator.integers(0, 9, num_samples) * 1.0, tokens * 1.0, packing_length)


@given(
    st.integers(1, 4),
    st.integers(2, 20),
    st.integers(0, 6),
    st.sampled_from([1, 2, 3]),
    st.booleans(),
    st.booleans(),
    st.randoms(use_true_random=False),
)
@settings(max_examples=40, deadline=None)
def test_groups_are_whole_in_every_step_and_pack(size, num_groups, step, dp_size, packed, mixed, random):
    ids = [7 * group for group in range(num_groups) for _ in range(size)]
    random.shuffle(ids)
    groups = groups_of(np.array(ids))
    mixture = None
    if mixed:
        half = num_groups // 2
        sources = (Source("a", half, 1.0), Source("b", num_groups - half, 2.0))
        mixture = Mixture(
            sources, (Phase(),), Shares(), lengths_N=np.ones(num_groups), batch_size=6, seed=1, shuffle=True
        )
    costs = costs_of(len(ids), 25 * size) if packed else None
    plan = GlobalBatchPlan(len(ids), 1, 6 * size, size, dp_size, True, costs, 1, mixture, groups)
    by_rank = [plan.microbatches(step, rank) for rank in range(dp_size)]
    for pack in (pack for rank in by_rank for pack in rank):
        # A group may be there twice, over the border of an epoch; but never a part of it.
        for index in pack:
            members = groups.members_GK[groups.group_of_N[index]].tolist()
            assert {ids[member] for member in members} == {ids[index]} and len(members) == size
            assert len({pack.count(member) for member in members}) == 1
    drawn = sorted(index for rank in by_rank for pack in rank for index in pack)
    one_rank = GlobalBatchPlan(len(ids), 1, 6 * size, size, 1, True, None, 1, mixture, groups)
    assert drawn == sorted(one_rank.global_batch_indices(step).tolist())


@given(st.lists(st.integers(0, 9), min_size=4, max_size=40), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_a_split_keeps_groups_of_any_size(ids, num_ranks):
    costs = costs_of(len(ids), 1000)
    parts = split(costs, num_ranks, groups_N=np.array(ids))
    packs = [pack for rank in parts for pack in rank]
    assert sorted(sample for pack in packs for sample in pack) == list(range(len(ids)))
    for one in set(ids):
        assert sum(any(ids[sample] == one for sample in pack) for pack in packs) == 1
    assert all(pack == tuple(sorted(pack)) for pack in packs)


def test_members_are_in_order():
    groups = groups_of(np.array([9, 4, 9, 4]))
    assert groups.members_GK.tolist() == [[0, 2], [1, 3]] and groups.group_of_N.tolist() == [0, 1, 0, 1]


def test_groups_of_another_size_are_left_out():
    groups = groups_of(np.array([5, 1, 7, 1, 3, 7, 5, 5]), leave_out=True)
    assert groups.members_GK.tolist() == [[1, 3], [2, 5]] and groups.size == 2
    assert groups.group_of_N.tolist() == [-1, 0, 1, 0, -1, 1, -1, -1]
    assert groups.reduced(np.arange(8), np.maximum).tolist() == [3, 5]
    assert groups.reduced(np.arange(8), np.add).tolist() == [4, 7]
    plan = GlobalBatchPlan(8, 3, 2, 2, 1, groups=groups)
    assert plan.num_steps(1) == 2
    assert sorted(np.concatenate([plan.global_batch_indices(step) for step in range(2)]).tolist()) == [1, 2, 3, 5]
    packed = GlobalBatchPlan(8, 3, 4, 1, 1, costs=costs_of(8, 100), groups=groups)
    assert sorted(index for pack in packed.microbatches(0, 0) for index in pack) == [1, 2, 3, 5]


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(UseError, match="groups of rows .data.group_by.: got between 1 and 2 rows .*begins with row 2"):
        groups_of(np.array([0, 0, 1, 2, 2]))
    pairs = groups_of(np.arange(8) // 2)
    with pytest.raises(UseError, match="train.micro_batch_size: got 1; expected a multiple of the 2 rows of a group"):
        GlobalBatchPlan(8, 0, 4, 1, 1, groups=pairs)
    with pytest.raises(UseError, match="train.global_batch_size: got 5; expected a multiple of the 2 rows"):
        GlobalBatchPlan(8, 0, 5, 1, 1, costs=costs_of(8, 100), groups=pairs)
    with pytest.raises(UseError, match="data.packing_length: got 25; expected at least .* longest group"):
        GlobalBatchPlan(8, 0, 4, 1, 1, costs=costs_of(8, 25), groups=pairs)
