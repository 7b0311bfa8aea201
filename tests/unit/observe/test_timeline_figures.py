import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megavlm.observe.timeline import Band, Timeline
from megavlm.observe.timeline_figures import (
    CAUSES,
    WORK_KINDS,
    add_costs,
    busy_by_kind,
    idle_by_cause,
    max_over_mean,
    measure_imbalance,
    measured_over_simulated,
    summarize,
)
from megavlm.observe.timeline_text import draw_text
from megavlm.pipeline.costs import stage_costs
from megavlm.pipeline.schedules import one_f_one_b
from megavlm.pipeline.simulate import CAUSES as SIMULATED_CAUSES
from megavlm.pipeline.simulate import simulate
from tests.unit.observe.timeline_builders import (
    event,
    make_schedule,
    realistic_timeline,
    simulated_band,
    uneven_costs,
)


def by_hand():
    """Two ranks, ten seconds: gaps, sends, every cause, reductions that wait for each other."""
    first = (
        event("EF", 0.0, 2.0),
        event("receive", 2.0, 2.5, payload="features", peer=1),
        event("F", 2.5, 4.0),
        event("send", 4.25, 4.5, payload="activation", peer=1),
        event("receive", 4.5, 7.0, payload="gradient", peer=1),
        event("B", 7.0, 8.0),
        event("receive", 8.0, 8.25, payload="feature_gradient", peer=0),
        event("EB", 8.25, 8.75),
        event("reduce", 9.0, 9.5),
    )
    second = (
        event("receive", 0.5, 4.5, payload="activation", peer=0),
        event("F", 4.5, 6.0),
        event("B", 6.0, 7.0),
        event("reduce", 9.0, 10.0),
    )
    return Band((first, second), 10.0)


def test_every_second_is_counted_once_under_its_cause():
    assert idle_by_cause(by_hand()) == (
        {"activation": 0, "gradient": 2.5, "features": 0.5, "encode": 0.25, "drained": 0.75, "between": 0.25},
        {"activation": 4.0, "gradient": 0, "features": 0, "encode": 0, "drained": 2.0, "between": 0.5},
    )
    assert busy_by_kind(by_hand()) == (
        {"E": 0, "EF": 2.0, "EB": 0.5, "F": 1.5, "B": 1.0, "send": 0.25, "reduce": 0.5},
        {"E": 0, "EF": 0, "EB": 0, "F": 1.5, "B": 1.0, "send": 0, "reduce": 1.0},
    )


def test_shares_and_ends_of_a_band():
    figures = summarize(by_hand())
    assert figures.makespan_s == 10.0
    assert figures.schedule_s == 8.75
    assert figures.bubble_share == pytest.approx((4.25 + 6.5) / 20)
    assert figures.idle_over_work == pytest.approx((4.25 + 6.5) / (5.0 + 2.5))
    assert figures.busy_share["send"] == pytest.approx(0.25 / 20)
    assert figures.idle_share["gradient"] == pytest.approx(2.5 / 20)


def test_a_rank_without_events_is_drained():
    figures = summarize(Band(((), (event("F", 0.0, 1.0),)), 1.0))
    assert figures.idle_R[0]["drained"] == 1.0 and figures.bubble_share == 0.5
    assert summarize(Band(((),), 1.0)).idle_over_work == math.inf


@given(
    st.sampled_from(["first_stage", "stage", "spread", "bubble"]),
    st.integers(2, 4),
    st.integers(1, 8),
    st.integers(0, 9),
)
def test_a_simulated_band_has_the_figures_of_the_simulator(placement, num_ranks, num_microbatches, seed):
    costs = uneven_costs(num_ranks, num_microbatches, seed=seed)
    simulation = simulate(make_schedule(placement, num_ranks, num_microbatches, costs), costs)
    figures = summarize(simulated_band(simulation, num_ranks))
    assert set(CAUSES) == {*SIMULATED_CAUSES, "between"}
    for rank in range(num_ranks):
        idle = figures.idle_R[rank]
        assert {cause: idle[cause] for cause in SIMULATED_CAUSES} == pytest.approx(simulation.idle_s[rank])
        assert idle["between"] == 0
        assert sum(figures.busy_R[rank][kind] for kind in WORK_KINDS) == pytest.approx(simulation.busy_s[rank])
        assert sum(figures.busy_R[rank].values()) + sum(idle.values()) == pytest.approx(figures.makespan_s)
    assert figures.idle_over_work == pytest.approx(simulation.bubble)
    assert figures.schedule_s == simulation.makespan_s


def test_the_bubble_of_equal_stages_has_its_closed_form():
    simulation = simulate(one_f_one_b(4, 8), stage_costs(4, 1, 8))
    figures = summarize(simulated_band(simulation, 4))
    assert figures.idle_over_work == pytest.approx(3 / 8)
    assert figures.bubble_share == pytest.approx(3 / 11)


def test_the_reduction_is_no_difference_from_the_simulation():
    simulated = Band(((event("F", 0.0, 1.0), event("B", 1.0, 4.0)),), 4.0)
    measured = Band(((event("F", 0.0, 1.0), event("B", 1.0, 5.0), event("reduce", 5.0, 9.0)),), 9.0)
    costs = ((1.0,),)
    timeline = Timeline(1, "text", "PP1", 1, 0.0, costs, costs, measured, simulated)
    assert measured_over_simulated(timeline) == pytest.approx(0.25)
    assert measured_over_simulated(Timeline(1, "text", "PP1", 1, 0.0, costs, costs, measured)) is None


def test_imbalance_both_ways():
    found = measure_imbalance([[1.0, 3.0, 0.0], [1.0, 0.0, 0.0]])
    assert found.ranks == pytest.approx(4 / 2.5)
    assert found.microbatches == pytest.approx(3 / (5 / 3))
    assert found.over_ranks_M == (1.0, 2.0, None)
    assert found.over_microbatches_R == (pytest.approx(9 / 4), pytest.approx(3.0))


def test_nothing_at_all_is_not_even():
    assert max_over_mean([0.0, 0.0]) is None
    found = measure_imbalance([[0.0, 0.0]])
    assert (found.ranks, found.microbatches, found.over_ranks_M) == (None, None, (None, None))


def test_parts_that_make_up_for_each_other_are_even_together():
    assert add_costs([[3.0, 0.0], [1.0, 2.0]], [[1.0, 4.0], [3.0, 2.0]]) == [[4.0, 4.0], [4.0, 4.0]]
    with pytest.raises(ValueError):
        add_costs([[1.0, 2.0]], [[1.0]])


def test_letters_say_what_a_rank_did_most_of_each_slot():
    lines = draw_text(by_hand(), num_columns=10).split("\n")
    assert lines == ["rank 0 |eeFF...BbR|", "rank 1 |....FFB..R|"]


def test_letters_of_a_large_step_have_one_line_a_rank():
    lines = draw_text(realistic_timeline(num_ranks=12, num_microbatches=12).measured).split("\n")
    assert len(lines) == 12 and {len(line) for line in lines} == {len("rank 11 ||") + 100}
    assert lines[0].startswith("rank  0 |") and lines[11].endswith("R|")
