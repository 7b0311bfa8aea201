"""What is sent to experts, and what it takes, by hand."""

import dataclasses

import pytest

from megavlm.models.architecture import ExpertsArchitecture
from megavlm.planner.experts import ExpertRanks, Routed, quicker_dispatcher, sent_bytes
from megavlm.planner.hardware import find_hardware
from megavlm.planner.plans import bounded
from megavlm.planner.timing import language_times, trained_of
from tests.unit.planner.builders import EXPERTS, make_problem
from tests.unit.planner.test_search import all_candidates

EIGHT = ExpertsArchitecture(num_experts=128, top_k=8, ffn_hidden_size=768)


def test_volumes() -> None:
    # 10 tokens of 6 bytes: 3/4 of their 8 copies go to other ranks, or each token once to the 3 others
    assert sent_bytes(EIGHT, ExpertRanks(4, 1, "alltoall"), 10, 3, 2) == (10 * 6 * 8 * 3 / 4, 0)
    assert sent_bytes(EIGHT, ExpertRanks(4, 1, "allgather"), 10, 3, 2) == (10 * 6 * 3, 0)
    # what has come is gathered by the two ranks that share an expert
    assert sent_bytes(EIGHT, ExpertRanks(4, 2, "alltoall"), 10, 3, 2) == (10 * 6 * 8 * 3 / 4, 10 * 6 * 8)
    assert sent_bytes(EIGHT, ExpertRanks(1, 1, "alltoall"), 10, 3, 2) == (0, 0)


@pytest.mark.parametrize(("expert", "kind"), [(1, "alltoall"), (2, "allgather"), (4, "allgather"), (16, "alltoall")])
def test_the_dispatcher_that_sends_less(expert: int, kind: str) -> None:
    assert quicker_dispatcher(EIGHT, expert, 1) == kind


def test_balanced_routing() -> None:
    assert ExpertRanks(4, 1, "alltoall").balanced(EIGHT, 10) == Routed(arriving=80, looked_at=10)
    assert ExpertRanks(4, 2, "allgather").balanced(EIGHT, 10) == Routed(arriving=160, looked_at=80)


def test_exchange_is_in_the_time_of_a_layer() -> None:
    """A layer's forward on ranks that share experts takes longer by its messages, and shorter by fewer experts."""
    problem = make_problem(architecture=EXPERTS)
    hardware = dataclasses.replace(find_hardware("h100"), expert_overhead_s=1e-3, node_latency_s=1e-4)
    by_expert = {
        one.layout.expert: one
        for one in all_candidates(problem)[1]
        if (one.layout.data, one.layout.recompute, one.layout.placement) == (4, "none", "first_stage")
    }
    assert set(by_expert) == {1, 2, 4}
    trained, packs = trained_of(problem.recipe), by_expert[1].pieces.batch.fullest
    alone, shared = (
        language_times(EXPERTS, hardware, by_expert[expert].layout, packs, trained).layer_forward_M for expert in (1, 4)
    )
    for pack, alone_s, shared_s in zip(packs, alone, shared, strict=True):
        message_s = pack.num_tokens * 2048 * 2 * 2 * 3 / 4 / hardware.bandwidth(4) + 1e-4
        assert shared_s - alone_s == pytest.approx(2 * message_s - 9 * 1e-3)


def test_layouts_with_experts_differ_in_their_end() -> None:
    """Gradients of experts are reduced over fewer ranks where more of them share the experts."""
    problem = make_problem(architecture=EXPERTS)
    layout = next(one.layout for one in all_candidates(problem)[1] if one.layout.data == 4)
    ends = [
        bounded(problem, [dataclasses.replace(layout, expert=expert)])[0].end.language_sync_s for expert in (1, 2, 4)
    ]
    assert ends[0] > ends[1] > ends[2] > 0
