import pytest

from megavlm.pipeline.actions import Compute, EncoderPlace, Message, Receive, Send, StageMap, assemble
from megavlm.pipeline.schedules import one_f_one_b, spread, vision_stages


def test_messages_stand_around_the_work_that_needs_and_gives_them():
    activation = Message("activation", 0, 0, 0, 1)
    gradient = Message("gradient", 0, 0, 1, 0)
    assert one_f_one_b(2, 1).actions == (
        (Compute("F", 0), Send(activation), Receive(gradient), Compute("B", 0)),
        (Receive(activation), Compute("F", 0), Compute("B", 0), Send(gradient)),
    )


def test_one_rank_sends_nothing():
    schedule = spread(1, 3, num_chunks=2)
    assert all(isinstance(action, Compute) for action in schedule.actions[0])


def test_text_form():
    assert str(spread(2, 1)) == (
        "spread: 2 ranks, 1 microbatches\n"
        "0: EF0 <f0@1 F0 >a0@1 <g0@1 B0 >fg0@1 EB0\n"
        "1: EF0 >f0@0 <a0@0 F0 B0 >g0@0 <fg0@0 EB0"
    )


def test_encoder_layers_in_series_hand_on_from_rank_to_rank():
    stage_map = vision_stages(2, 2, 1).stage_map
    assert stage_map.first_rank == 2
    assert stage_map.gives(0, Compute("EF", 0)) == [Message("vision_activation", 0, 0, 0, 1)]
    assert stage_map.gives(1, Compute("EF", 0)) == [Message("features", 0, 0, 1, 2)]
    assert stage_map.needs(2, Compute("F", 0)) == [Message("features", 0, 0, 1, 2)]
    assert stage_map.gives(2, Compute("B", 0)) == [Message("feature_gradient", 0, 0, 2, 1)]
    assert stage_map.needs(0, Compute("EB", 0)) == [Message("vision_gradient", 0, 0, 1, 0)]


def test_shares_go_to_the_first_stage_and_their_gradients_back():
    stage_map = StageMap(3, 1, ((0, 0), (1, 0)), EncoderPlace((0, 2)))
    assert stage_map.needs(0, Compute("F", 0)) == [
        Message("features", 0, 0, 0, 0),
        Message("features", 0, 0, 2, 0),
    ]
    assert stage_map.gives(0, Compute("B", 0))[1] == Message("feature_gradient", 0, 0, 0, 2)
    assert stage_map.computes(1) == [Compute("F", 0), Compute("B", 0)]
    assert stage_map.computes(2) == [Compute("EF", 0), Compute("EB", 0)]


def test_frozen_encoder_gets_no_gradient():
    stage_map = StageMap(1, 2, ((0, 0),), EncoderPlace((0,), is_trained=False))
    assert stage_map.gives(0, Compute("B", 0)) == []
    assert {compute.kind for compute in stage_map.computes(0)} == {"E", "F", "B"}


def test_encoding_again_sends_nothing_again():
    stage_map = StageMap(2, 1, ((0, 0),), EncoderPlace((1,)))
    orders = [[Compute("F", 0), Compute("B", 0)], [Compute("E", 0), Compute("EF", 0), Compute("EB", 0)]]
    schedule = assemble("x", stage_map, orders)
    assert [str(action) for action in schedule.actions[1]] == [
        "E0",
        "send(features0 1>0)",
        "EF0",
        "receive(feature_gradient0 0>1)",
        "EB0",
    ]


def test_a_stage_is_held_once():
    with pytest.raises(AssertionError, match="twice"):
        StageMap(2, 1, ((0, 0), (0, 0)))
