import math

import numpy as np
import pytest

from megavlm.pipeline.actions import Compute, Message
from megavlm.pipeline.costs import Link, stage_costs


def test_numbers_and_arrays_fill_the_shape():
    costs = stage_costs(2, 1, 3, forward_s=[[[1, 2, 3]], [[4, 5, 6]]], encode_forward_s=[[1], [2]])
    assert costs.shape == (2, 1, 3)
    assert costs.time_s(1, Compute("F", 2)) == 6
    assert costs.time_s(1, Compute("B", 2)) == 2
    assert costs.time_s(1, Compute("E", 0)) == costs.time_s(1, Compute("EF", 2)) == 2
    assert costs.time_s(1, Compute("EB", 0)) == 0
    assert costs.work_s == 21 + 12 + 9


def test_features_cost_what_their_encoder_rank_hands_on():
    costs = stage_costs(2, 1, 2, activation_bytes=[10, 20], feature_bytes=[[1, 2], [3, 4]])
    assert costs.message_bytes(Message("features", 1, 0, 1, 0)) == 4
    assert costs.message_bytes(Message("feature_gradient", 1, 0, 0, 1)) == 4
    assert costs.message_bytes(Message("vision_activation", 0, 0, 0, 1)) == 1
    assert costs.message_bytes(Message("vision_gradient", 0, 0, 1, 0)) == 1
    assert costs.message_bytes(Message("gradient", 1, 0, 1, 0)) == 20


def test_what_cannot_be():
    with pytest.raises(AssertionError, match="forward_s"):
        stage_costs(1, 1, 1, forward_s=-1)
    with pytest.raises(AssertionError, match="backward_s"):
        stage_costs(1, 1, 1, backward_s=math.nan)
    with pytest.raises(ValueError):
        stage_costs(2, 1, 3, encode_forward_s=np.zeros(2))
    with pytest.raises(AssertionError):
        Link(bandwidth_bytes_per_s=0)


def test_costs_do_not_change():
    given = np.ones((1, 2))
    costs = stage_costs(1, 1, 2, encode_forward_s=given)
    given[:] = 5
    assert costs.encode_forward_s_RM.tolist() == [[1, 1]]
    with pytest.raises(ValueError, match="read-only"):
        costs.encode_forward_s_RM[0, 0] = 2
