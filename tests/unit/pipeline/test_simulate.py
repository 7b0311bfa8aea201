import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megavlm.errors import RunError
from megavlm.pipeline.actions import Compute, Receive
from megavlm.pipeline.checks import max_live
from megavlm.pipeline.costs import Link, stage_costs
from megavlm.pipeline.schedules import interleaved, one_f_one_b, spread, vision_stages
from megavlm.pipeline.simulate import simulate
from tests.unit.pipeline.builders import costs_for, schedules


@given(st.integers(1, 6), st.integers(1, 20), st.integers(1, 5), st.integers(1, 5))
def test_1f1b_bubble(num_ranks, num_microbatches, forward, backward):
    costs = stage_costs(num_ranks, 1, num_microbatches, forward_s=forward, backward_s=backward)
    result = simulate(one_f_one_b(num_ranks, num_microbatches), costs)
    assert result.makespan_s == (num_microbatches + num_ranks - 1) * (forward + backward)
    assert result.bubble == pytest.approx((num_ranks - 1) / num_microbatches)


@given(st.integers(1, 5), st.integers(2, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
def test_interleaved_bubble(num_ranks, num_chunks, num_rounds, forward, backward):
    num_microbatches = num_ranks * num_rounds
    costs = stage_costs(num_ranks, num_chunks, num_microbatches, forward_s=forward, backward_s=backward)
    result = simulate(interleaved(num_ranks, num_chunks, num_microbatches), costs)
    assert result.bubble == pytest.approx((num_ranks - 1) / (num_chunks * num_microbatches))


def test_vision_stage_of_equal_cost_is_1f1b_with_one_rank_more():
    costs = stage_costs(4, 1, 6, forward_s=1, backward_s=2, encode_forward_s=1, encode_backward_s=2)
    assert simulate(vision_stages(2, 2, 6), costs).makespan_s == (6 + 3) * 3


def test_spread_is_a_phase_before_and_a_phase_behind():
    costs = stage_costs(3, 1, 6, encode_forward_s=0.5, encode_backward_s=1)
    result = simulate(spread(3, 6), costs)
    # The first rank is the last one: it begins the language model after its share and ends with all the gradients.
    assert result.makespan_s == 6 * 0.5 + (6 + 2) * 3 + 6 * 1


@given(schedules(), st.data())
def test_time_is_accounted_for(schedule, data):
    costs = data.draw(costs_for((schedule.num_ranks, schedule.num_chunks, schedule.num_microbatches)))
    result = simulate(schedule, costs)
    for rank in range(schedule.num_ranks):
        assert result.busy_s[rank] + sum(result.idle_s[rank].values()) == result.makespan_s
        assert result.busy_s[rank] == sum(costs.time_s(rank, compute) for compute in schedule.computes(rank))
        events = [event for event in result.events if event.rank == rank]
        for before, after in zip(events, events[1:], strict=False):
            assert before.end_s == after.start_s
        assert tuple(e.action for e in events if isinstance(e.action, Compute)) == schedule.computes(rank)
        assert result.peak_live[rank].encoder_microbatches == max_live(schedule, rank, "EF", "EB")
        assert result.peak_live[rank].llm_microbatches == max_live(schedule, rank, "F", "B")


@given(schedules(), st.data())
def test_nothing_begins_before_what_it_needs_has_ended(schedule, data):
    costs = data.draw(costs_for((schedule.num_ranks, schedule.num_chunks, schedule.num_microbatches)))
    ended = {}
    for event in simulate(schedule, costs).events:
        if isinstance(event.action, Compute):
            for message in schedule.stage_map.gives(event.rank, event.action):
                ended.setdefault(message, event.end_s)
    for event in simulate(schedule, costs).events:
        if isinstance(event.action, Compute):
            assert all(ended[need] <= event.start_s for need in schedule.stage_map.needs(event.rank, event.action))


@given(schedules(), st.data(), st.sampled_from([0.5, 2, 8]))
def test_makespan_scales_with_the_costs(schedule, data, factor):
    costs = data.draw(costs_for((schedule.num_ranks, schedule.num_chunks, schedule.num_microbatches)))
    scaled = dataclasses.replace(
        costs,
        forward_s_RCM=factor * costs.forward_s_RCM,
        backward_s_RCM=factor * costs.backward_s_RCM,
        encode_forward_s_RM=factor * costs.encode_forward_s_RM,
        encode_backward_s_RM=factor * costs.encode_backward_s_RM,
    )
    assert simulate(schedule, scaled).makespan_s == factor * simulate(schedule, costs).makespan_s


def test_messages_take_time_and_idle_time_has_its_cause():
    link = Link(bandwidth_bytes_per_s=10, latency_s=0.5)
    costs = stage_costs(2, 1, 1, activation_bytes=10, link=link)
    result = simulate(one_f_one_b(2, 1), costs)
    # F 1, message 1.5, F 1 and B 2, message 1.5, B 2.
    assert result.makespan_s == 9
    assert result.idle_s[0] == {"activation": 0, "gradient": 6, "features": 0, "encode": 0, "drained": 0}
    assert result.idle_s[1] == {"activation": 2.5, "gradient": 0, "features": 0, "encode": 0, "drained": 3.5}
    waits = [(event.rank, event.start_s, event.end_s) for event in result.events if isinstance(event.action, Receive)]
    assert waits == [(0, 1, 7), (1, 0, 2.5)]


def test_messages_of_one_direction_follow_each_other():
    # Rank 1's features, 3 s each, arrive after 3 s and 6 s; the gradients leave then, together, and take as long.
    costs = stage_costs(2, 1, 2, forward_s=0, backward_s=0, feature_bytes=3, link=Link(1.0))
    result = simulate(spread(2, 2), costs)
    assert result.idle_s[0]["features"] == 6
    assert result.idle_s[1]["encode"] == 6
    assert result.makespan_s == 12


def test_waiting_for_features_and_for_the_encoders_gradient():
    costs = stage_costs(2, 1, 1, forward_s=1, backward_s=2, encode_forward_s=[[1], [3]], encode_backward_s=1)
    result = simulate(spread(2, 1), costs)
    # Rank 0 waits 2 s for rank 1's share; rank 1 waits for the feature gradient while rank 0 runs its 2 s backward.
    assert result.idle_s[0]["features"] == 2
    assert result.idle_s[1]["encode"] == 2


def test_live_bytes():
    costs = stage_costs(2, 1, 3, llm_live_bytes=[[[1, 2, 4]], [[8, 16, 32]]], encoder_live_bytes=[[1, 2, 3], [5, 5, 5]])
    peaks = simulate(spread(2, 3), costs).peak_live
    assert (peaks[0].llm_bytes, peaks[1].llm_bytes) == (6, 32)
    assert (peaks[0].encoder_bytes, peaks[1].encoder_bytes) == (6, 15)
    assert peaks[0].encoder_microbatches == 3


def test_a_schedule_that_never_ends():
    schedule = one_f_one_b(2, 1)
    row = list(schedule.actions[0])
    row.insert(0, row.pop(2))
    spoilt = dataclasses.replace(schedule, actions=(tuple(row), schedule.actions[1]))
    with pytest.raises(RunError, match=r"rank 0 waits .*gradient0 1>0.*rank 1 waits .*activation0 0>1"):
        simulate(spoilt, stage_costs(2, 1, 1))


def test_costs_of_another_layout():
    with pytest.raises(AssertionError, match="shape"):
        simulate(one_f_one_b(2, 3), stage_costs(2, 1, 4))
