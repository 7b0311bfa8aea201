import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.data.balance import SampleCosts
from megavlm.data.plan import GlobalBatchPlan
from megavlm.errors import UseError


def plan(num_samples=10, seed=3, global_batch_size=4, micro_batch_size=1, dp_size=1, shuffle=True):
    return GlobalBatchPlan(num_samples, seed, global_batch_size, micro_batch_size, dp_size, shuffle)


def test_order_is_fixed_for_ever():
    # From PCG64's raw stream; a change here would break the resume of every run that exists.
    assert plan(num_samples=8, seed=1234, global_batch_size=16).global_batch_indices(0).tolist() == [
        *[5, 6, 3, 7, 4, 1, 2, 0],
        *[2, 0, 7, 6, 1, 4, 5, 3],
    ]


def test_file_order_without_shuffling():
    ordered = plan(num_samples=5, global_batch_size=4, shuffle=False)
    assert [ordered.global_batch_indices(step).tolist() for step in range(3)] == [
        [0, 1, 2, 3],
        [4, 0, 1, 2],
        [3, 4, 0, 1],
    ]


@given(st.integers(1, 40), st.integers(0, 5), st.integers(1, 50))
def test_every_epoch_sees_every_sample_once(num_samples, seed, global_batch_size):
    shuffled = plan(num_samples, seed, global_batch_size)
    num_steps = -(-3 * num_samples // global_batch_size)
    stream = np.concatenate([shuffled.global_batch_indices(step) for step in range(num_steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))


def test_epochs_and_seeds_differ():
    orders = {
        (seed, epoch): tuple(plan(100, seed, 100).global_batch_indices(epoch)) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4


@given(
    st.integers(1, 30),
    st.integers(0, 20),
    st.sampled_from([(8, micro, dp) for micro, dp in itertools.product((1, 2, 4), (1, 2, 4)) if 8 % (micro * dp) == 0]),
)
def test_microbatches_of_all_ranks_are_the_global_batch_in_order(num_samples, step, sizes):
    layout = plan(num_samples, 7, *sizes)
    reference = plan(num_samples, 7, 8).global_batch_indices(step)
    by_rank = [layout.microbatches(step, dp_rank) for dp_rank in range(layout.dp_size)]
    assert {len(microbatches) for microbatches in by_rank} == {layout.num_microbatches}
    assert all(len(indices) == layout.micro_batch_size for rank in by_rank for indices in rank)
    # Microbatch m of rank d is number m * dp + d of the whole.
    joined = [index for rounds in zip(*by_rank, strict=True) for indices in rounds for index in indices]
    assert joined == reference.tolist()


def test_steps_and_cursor():
    ten = plan(num_samples=10, global_batch_size=4)
    assert [ten.num_steps(epochs) for epochs in (0.1, 0.4, 1, 2)] == [1, 1, 3, 5]
    assert ten.num_consumed(6) == 24
    # Resuming is asking for a later step: nothing depends on the steps before.
    assert plan(10, 3, 4).global_batch_indices(6).tolist() == ten.global_batch_indices(6).tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "data.train: got no rows that fit"),
        ({"global_batch_size": 6, "micro_batch_size": 2, "dp_size": 2}, r"train\.global_batch_size: got 6; .* 2 \* 2"),
        ({"global_batch_size": 0}, r"train\.global_batch_size: got 0"),
        ({"seed": -1}, r"train\.seed: got -1"),
    ],
)
def test_impossible_plans_are_refused(changes, message):
    with pytest.raises(UseError, match=message):
        plan(**changes)


def test_what_a_plan_gives_cannot_spoil_the_next_call():
    shuffled = plan()
    shuffled.global_batch_indices(0)[:] = 0
    assert len(set(shuffled.global_batch_indices(0))) == 4


def costs_of(num_samples, packing_length=100):
    generator = np.random.default_rng(num_samples)
    tokens = generator.integers(5, 50, num_samples)
    return SampleCosts(tokens, generator.integers(0, 9, num_samples) * 1.0, tokens * 1.0, packing_length)


def by_cost(num_samples=60, global_batch_size=24, dp_size=1, packing_length=100, multiple=1, seed=3):
    costs = costs_of(num_samples, packing_length)
    return GlobalBatchPlan(num_samples, seed, global_batch_size, 1, dp_size, True, costs, multiple)


@given(
    st.integers(1, 60), st.integers(0, 9), st.integers(1, 4), st.sampled_from([50, 70, 130]), st.sampled_from([1, 2, 4])
)
@settings(deadline=None)
def test_the_samples_of_a_step_do_not_depend_on_the_layout(num_samples, step, dp_size, packing_length, multiple):
    packed = by_cost(num_samples, 24, dp_size, packing_length, multiple)
    by_rank = [packed.microbatches(step, dp_rank) for dp_rank in range(dp_size)]
    assert {len(rank) for rank in by_rank} == {packed.num_microbatches_of(step)}
    assert packed.num_microbatches_of(step) % multiple == 0
    samples = [index for rank in by_rank for pack in rank for index in pack]
    assert sorted(samples) == sorted(plan(num_samples, 3, 24).global_batch_indices(step).tolist())
    tokens = costs_of(num_samples, packing_length).num_tokens_N
    assert all(tokens[list(pack)].sum() <= packing_length for rank in by_rank for pack in rank)


def test_a_pack_keeps_the_order_of_the_global_batch():
    packed = by_cost()
    place = {index: place for place, index in enumerate(packed.global_batch_indices(1).tolist())}
    for pack in packed.microbatches(1, 0):
        assert [place[index] for index in pack] == sorted(place[index] for index in pack)


def test_two_ranks_and_two_processes_agree():
    # Separate plans share no cache entry: the second is computed anew.
    assert by_cost(dp_size=2).microbatches(3, 1) == by_cost(dp_size=2).microbatches(3, 1)


def test_steps_by_cost_have_unequal_numbers_of_microbatches():
    packed = by_cost(num_samples=500, global_batch_size=16)
    numbers = {packed.num_microbatches_of(step) for step in range(20)}
    assert len(numbers) > 1
    with pytest.raises(AssertionError, match="num_microbatches_of"):
        _ = packed.num_microbatches
    assert plan().num_microbatches_of(7) == plan().num_microbatches == 4


def test_more_packs_than_samples_are_needed():
    # Nine samples that share no pack, on four ranks: three rounds, three of whose packs are empty.
    tokens = np.full(9, 60)
    packed = GlobalBatchPlan(9, 0, 9, 1, 4, True, SampleCosts(tokens, tokens * 1.0, tokens * 1.0, 100))
    by_rank = [packed.microbatches(0, dp_rank) for dp_rank in range(4)]
    assert sorted(len(pack) for rank in by_rank for pack in rank) == [0] * 3 + [1] * 9


def test_any_global_batch_size_of_at_least_a_sample_a_pack():
    assert by_cost(global_batch_size=23, dp_size=4, multiple=2).num_microbatches_of(0) % 2 == 0
    message = r"train\.global_batch_size: got 7; expected at least 8, .*4 data parallel ranks x a multiple of 2"
    with pytest.raises(UseError, match=message):
        by_cost(global_batch_size=7, dp_size=4, multiple=2)
