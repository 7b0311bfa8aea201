"""Schedules that were right, spoilt in one place: the checks see it."""

import dataclasses

from hypothesis import assume, given
from hypothesis import strategies as st

from megavlm.pipeline.actions import Compute, Receive, Send
from megavlm.pipeline.checks import find_deadlock, violations
from megavlm.pipeline.schedules import first_stage, one_f_one_b, spread, vision_stages
from tests.unit.pipeline.builders import schedules


def with_row(schedule, rank, row):
    rows = list(schedule.actions)
    rows[rank] = tuple(row)
    return dataclasses.replace(schedule, actions=tuple(rows))


@st.composite
def places(draw):
    """A schedule, a rank, its actions, and an index into these."""
    schedule = draw(schedules())
    rank = draw(st.integers(0, schedule.num_ranks - 1))
    row = list(schedule.actions[rank])
    return schedule, rank, row, draw(st.integers(0, len(row) - 1))


@given(places())
def test_a_dropped_action(place):
    schedule, rank, row, index = place
    del row[index]
    assert violations(with_row(schedule, rank, row))


@given(places())
def test_an_action_done_twice(place):
    schedule, rank, row, index = place
    row.insert(index, row[index])
    assert violations(with_row(schedule, rank, row))


@given(places())
def test_a_receive_behind_the_work_that_needs_it(place):
    schedule, rank, row, index = place
    receives = [i for i, action in enumerate(row) if isinstance(action, Receive)]
    assume(receives)
    start = receives[index % len(receives)]
    message = row[start].message
    end = next(
        i
        for i in range(start, len(row))
        if isinstance(row[i], Compute) and message in schedule.stage_map.needs(rank, row[i])
    )
    row.insert(end, row.pop(start))
    assert any("without" in text for text in violations(with_row(schedule, rank, row)))


@given(places())
def test_a_send_before_the_work_that_gives_it(place):
    schedule, rank, row, index = place
    sends = [i for i, action in enumerate(row) if isinstance(action, Send)]
    assume(sends)
    row.insert(0, row.pop(sends[index % len(sends)]))
    assert any("before it is computed" in text for text in violations(with_row(schedule, rank, row)))


@given(places())
def test_a_reversed_rank(place):
    schedule, rank, row, _ = place
    assert violations(with_row(schedule, rank, reversed(row)))


@given(places(), st.data())
def test_two_messages_of_a_channel_received_in_another_order(place, data):
    schedule, rank, row, index = place
    receives = [i for i, action in enumerate(row) if isinstance(action, Receive)]
    pairs = [(a, b) for a in receives for b in receives if a < b and row[a].message.channel == row[b].message.channel]
    assume(pairs)
    first, second = data.draw(st.sampled_from(pairs))
    row[first], row[second] = row[second], row[first]
    assert any("another order" in text for text in violations(with_row(schedule, rank, row)))


def test_a_deadlock_names_who_waits_and_for_what():
    schedule = one_f_one_b(2, 1)
    row = list(schedule.actions[0])
    row.insert(0, row.pop(2))  # the gradient first, which comes from what is not sent yet
    waiting = find_deadlock(with_row(schedule, 0, row))
    assert [str(item) for item in waiting] == [
        "rank 0 waits at action 0: receive(gradient0 1>0)",
        "rank 1 waits at action 0: receive(activation0 0>1)",
    ]


def test_a_bound_that_is_not_held():
    schedule = dataclasses.replace(spread(2, 3), max_live_encoder=2)
    assert violations(schedule) == [
        f"rank {rank}: encoder activations of 3 microbatches, the bound is 2" for rank in range(2)
    ]


def test_an_action_on_the_wrong_rank():
    schedule = vision_stages(1, 1, 1)
    spoilt = with_row(with_row(schedule, 0, schedule.actions[1]), 1, schedule.actions[0])
    found = violations(spoilt)
    assert "rank 0: F0 is too much" in found and "rank 0: EF0 is missing" in found


def test_encoding_once_more_without_need():
    schedule = first_stage(1, 1)
    late = [*schedule.actions[0], Compute("E", 0)]
    assert violations(with_row(schedule, 0, late)) == ["rank 0, action 4: E0 behind its EF"]
