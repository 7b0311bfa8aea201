import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.errors import UseError
from megavlm.pipeline.bubble import QUICK_RULES, RULES, bubble, least_live_encoder
from megavlm.pipeline.checks import max_live, violations
from megavlm.pipeline.costs import Link, stage_costs
from megavlm.pipeline.schedules import first_stage, spread
from megavlm.pipeline.simulate import simulate
from tests.unit.pipeline.builders import FEW_RULES, costs_for, layouts


@st.composite
def tasks(draw):
    """(layout, costs, bound)."""
    layout = draw(layouts(max_chunks=2))
    least = least_live_encoder(*layout) if layout[1] > 1 else 1
    return layout, draw(costs_for(layout)), least + draw(st.integers(0, 4))


def place(task, **kwargs):
    (num_ranks, num_chunks, num_microbatches), costs, bound = task
    return bubble(num_ranks, num_microbatches, costs, max_live_encoder=bound, num_chunks=num_chunks, **kwargs)


@given(tasks())
def test_the_bound_is_held_under_every_rule(task):
    for rule in FEW_RULES:
        schedule = place(task, rules=[rule])
        assert violations(schedule) == []
        assert schedule.max_live_encoder == task[2]


@given(tasks())
@settings(max_examples=30)
def test_the_best_rule_is_taken(task):
    best = simulate(place(task, rules=FEW_RULES), task[1]).makespan_s
    assert best == min(simulate(place(task, rules=[rule]), task[1]).makespan_s for rule in FEW_RULES)


@given(tasks())
@settings(max_examples=30)
def test_encoding_again_holds_one_microbatch(task):
    schedule = place(task, recompute=True, rules=FEW_RULES)
    assert violations(schedule) == []
    assert all(max_live(schedule, rank, "EF", "EB") == 1 for rank in range(schedule.num_ranks))


@given(tasks())
@settings(max_examples=30)
def test_a_frozen_encoder_runs_no_backward(task):
    schedule = place(task, train_encoder=False, rules=FEW_RULES)
    assert violations(schedule) == []
    assert {c.kind for rank in range(schedule.num_ranks) for c in schedule.computes(rank)} == {"E", "F", "B"}


@pytest.mark.parametrize("num_chunks", [1, 2])
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("encoder_share", [0.1, 0.5, 1.0, 3.0])
def test_shorter_than_spread_with_less_alive(num_ranks, num_chunks, encoder_share):
    for num_microbatches in (2 * num_ranks, 4 * num_ranks):
        costs = stage_costs(
            num_ranks,
            num_chunks,
            num_microbatches,
            forward_s=1 / num_chunks,
            backward_s=2 / num_chunks,
            encode_forward_s=encoder_share,
            encode_backward_s=2 * encoder_share,
        )
        bound = max(num_ranks + 2, least_live_encoder(num_ranks, num_chunks, num_microbatches))
        schedule = bubble(num_ranks, num_microbatches, costs, max_live_encoder=bound, num_chunks=num_chunks)
        whole = simulate(spread(num_ranks, num_microbatches, num_chunks=num_chunks), costs)
        assert simulate(schedule, costs).makespan_s < whole.makespan_s


def test_what_is_alive_does_not_grow_with_the_microbatches():
    def peak(num_microbatches):
        costs = stage_costs(4, 1, num_microbatches, encode_forward_s=0.3, encode_backward_s=0.6, encoder_live_bytes=1)
        schedule = bubble(4, num_microbatches, costs, max_live_encoder=6, rules=FEW_RULES)
        return max(live.encoder_bytes for live in simulate(schedule, costs).peak_live)

    assert peak(64) == peak(8) == 6


def test_bubbles_are_filled():
    """Ranks idle for 9 s around 48 s of 1F1B; an encoder of 9.6 s could fill that, were there no order and no bound."""
    costs = stage_costs(4, 1, 16, encode_forward_s=0.2, encode_backward_s=0.4)
    ideal = costs.work_s / 4
    idle = {
        bound: simulate(bubble(4, 16, costs, max_live_encoder=bound), costs).makespan_s - ideal for bound in (6, 8, 16)
    }
    assert simulate(spread(4, 16), costs).makespan_s - ideal == pytest.approx(9)
    assert idle[16] < idle[8] < idle[6] < 6.5
    assert idle[16] < 3.5


def test_a_large_bound_beats_the_encoder_on_the_first_stage():
    on_first = stage_costs(4, 1, 8, encode_forward_s=[[2]] + [[0]] * 3, encode_backward_s=[[4]] + [[0]] * 3)
    shared = stage_costs(4, 1, 8, encode_forward_s=0.5, encode_backward_s=1)
    before = simulate(first_stage(4, 8), on_first).makespan_s
    assert simulate(bubble(4, 8, shared, max_live_encoder=8), shared).makespan_s < before / 1.7


@given(
    layouts(max_chunks=1).flatmap(lambda layout: st.tuples(st.just(layout), costs_for(layout), st.integers(1, 6))),
    st.integers(1, 3),
)
@settings(max_examples=30)
def test_more_in_flight_holds_both_bounds(task, extra):
    layout, _, bound = task
    schedule = place(task, extra_in_flight=extra, rules=FEW_RULES)
    assert violations(schedule) == []
    num_ranks, _, num_microbatches = layout
    for rank in range(num_ranks):
        most = num_ranks - rank + (extra if rank < num_ranks - 1 else 0)
        assert max_live(schedule, rank, "F", "B") == min(most, bound, num_microbatches)


def test_more_in_flight_leaves_less_idle():
    """The encoder is as large as the gaps, but before the first gradient only 8 microbatches can be encoded."""
    costs = stage_costs(4, 1, 16, encode_forward_s=0.4, encode_backward_s=0.8)
    by_extra = [
        simulate(bubble(4, 16, costs, max_live_encoder=8, extra_in_flight=extra), costs).makespan_s for extra in (0, 1)
    ]
    assert by_extra[1] < by_extra[0] - 0.9


def test_more_in_flight_only_with_one_chunk():
    with pytest.raises(AssertionError, match="interleaved"):
        bubble(2, 4, stage_costs(2, 2, 4), max_live_encoder=8, num_chunks=2, extra_in_flight=1)


def test_few_rules_are_nearly_as_good():
    costs = stage_costs(4, 1, 16, encode_forward_s=0.3, encode_backward_s=0.6)
    every, quick = (
        simulate(bubble(4, 16, costs, max_live_encoder=8, rules=rules), costs).makespan_s
        for rules in (RULES, QUICK_RULES)
    )
    assert set(QUICK_RULES) < set(RULES)
    assert every <= quick <= 1.005 * every


def test_slow_links_do_not_stop_it():
    costs = stage_costs(
        3,
        1,
        5,
        encode_forward_s=0.5,
        encode_backward_s=1,
        activation_bytes=2,
        feature_bytes=1,
        link=Link(bandwidth_bytes_per_s=4, latency_s=0.1),
    )
    schedule = bubble(3, 5, costs, max_live_encoder=4)
    assert violations(schedule) == []
    assert simulate(schedule, costs).makespan_s < simulate(spread(3, 5), costs).makespan_s


def test_same_costs_same_schedule():
    costs = stage_costs(3, 1, 5, encode_forward_s=0.5, encode_backward_s=1)
    assert bubble(3, 5, costs, max_live_encoder=4) == bubble(3, 5, costs, max_live_encoder=4)


@pytest.mark.parametrize("num_ranks, num_chunks, bound", [(4, 1, 0), (4, 2, 6)])
def test_a_bound_that_cannot_be_held(num_ranks, num_chunks, bound):
    costs = stage_costs(num_ranks, num_chunks, 16)
    with pytest.raises(UseError, match="max_live_encoder: got .*expected at least"):
        bubble(num_ranks, 16, costs, max_live_encoder=bound, num_chunks=num_chunks, rules=RULES[:1])


def test_least_bound():
    assert least_live_encoder(4, 1, 16) == 4
    assert least_live_encoder(4, 1, 2) == 2
    assert least_live_encoder(4, 2, 16) > 4
