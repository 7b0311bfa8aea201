import pytest
from hypothesis import given
from hypothesis import strategies as st

from megavlm.errors import UseError
from megavlm.pipeline.checks import max_live, violations
from megavlm.pipeline.schedules import first_stage, interleaved, language_orders, one_f_one_b, spread, vision_stages
from tests.unit.pipeline.builders import layouts, schedules


def text(schedule, rank):
    return " ".join(str(compute) for compute in schedule.computes(rank))


@given(schedules())
def test_every_schedule_is_complete_ordered_matched_bounded_and_ends(schedule):
    assert violations(schedule) == []


def test_1f1b_by_hand():
    schedule = one_f_one_b(3, 4)
    assert text(schedule, 0) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert text(schedule, 1) == "F0 F1 B0 F2 B1 F3 B2 B3"
    assert text(schedule, 2) == "F0 B0 F1 B1 F2 B2 F3 B3"


def test_interleaved_by_hand_in_megatrons_order():
    # 2 ranks, 2 chunks: rank 0 runs (2 - 0 - 1) * 2 + (2 - 1) * 2 = 4 forwards ahead, rank 1 runs 2.
    schedule = interleaved(2, 2, 4)
    assert text(schedule, 0) == "F0 F1 F0.1 F1.1 F2 B0.1 F3 B1.1 F2.1 B0 F3.1 B1 B2.1 B3.1 B2 B3"
    assert text(schedule, 1) == "F0 F1 F0.1 B0.1 F1.1 B1.1 F2 B0 F3 B1 F2.1 B2.1 F3.1 B3.1 B2 B3"


@given(st.integers(1, 6), st.integers(1, 12))
def test_1f1b_holds_as_many_microbatches_as_ranks_are_behind(num_ranks, num_microbatches):
    schedule = one_f_one_b(num_ranks, num_microbatches)
    for rank in range(num_ranks):
        assert max_live(schedule, rank, "F", "B") == min(num_microbatches, num_ranks - rank)


@given(st.integers(2, 5), st.integers(2, 4), st.integers(2, 4))
def test_interleaved_holds_pv_plus_p_minus_1_chunks_on_the_first_rank(num_ranks, num_chunks, num_rounds):
    schedule = interleaved(num_ranks, num_chunks, num_ranks * num_rounds)
    assert max_live(schedule, 0, "F", "B") == num_ranks * num_chunks + num_ranks - 1


def test_first_stage_encodes_next_to_the_first_layers():
    schedule = first_stage(2, 2)
    assert text(schedule, 0) == "EF0 F0 EF1 F1 B0 EB0 B1 EB1"
    assert text(schedule, 1) == "F0 B0 F1 B1"
    assert text(first_stage(2, 2, train_encoder=False), 0) == "E0 F0 E1 F1 B0 B1"


def test_vision_stages_are_a_longer_pipeline():
    schedule = vision_stages(1, 2, 3)
    assert text(schedule, 0) == "EF0 EF1 EF2 EB0 EB1 EB2"
    assert text(schedule, 1) == "F0 F1 B0 F2 B1 B2"
    assert text(schedule, 2) == "F0 B0 F1 B1 F2 B2"


@given(layouts())
def test_spread_memory(layout):
    num_ranks, num_chunks, num_microbatches = layout
    kept = spread(num_ranks, num_microbatches, num_chunks=num_chunks)
    again = spread(num_ranks, num_microbatches, num_chunks=num_chunks, recompute=True)
    frozen = spread(num_ranks, num_microbatches, num_chunks=num_chunks, train_encoder=False)
    for rank in range(num_ranks):
        assert max_live(kept, rank, "EF", "EB") == num_microbatches
        assert max_live(again, rank, "EF", "EB") == 1
        assert max_live(frozen, rank, "EF", "EB") == 0


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 6))
def test_fewer_in_flight(num_ranks, num_microbatches, max_in_flight):
    order = language_orders(num_ranks, 1, num_microbatches, max_in_flight)[0]
    live = most = 0
    for compute in order:
        live += 1 if compute.kind == "F" else -1
        most = max(most, live)
    assert most == min(num_ranks, num_microbatches, max_in_flight)


def test_interleaving_needs_whole_rounds():
    with pytest.raises(UseError, match="virtual_pipeline_model_parallel_size"):
        interleaved(4, 2, 6)
