import math

import pytest
import torch

from megavlm.losses.process_reward import process_reward_loss


def test_weights_of_steps_are_those_of_their_losses():
    scores = torch.tensor([2.0, 5.0, -1.0, 0.0])
    loss_sum, weight, metrics = process_reward_loss(scores, torch.tensor([0.5, 0.0, -2.0, 1.0]))
    expected = 0.5 * math.log1p(math.exp(-2)) + 2 * math.log1p(math.exp(-1)) + math.log(2)
    assert float(loss_sum) == pytest.approx(expected, rel=1e-6)
    assert float(weight) == 3.5
    # a score of 0 says that the third step is wrong, which it is not
    counts = {"count/right": 2, "agrees/right": 1, "count/wrong": 1, "agrees/wrong": 1}
    assert {name: float(value) for name, value in metrics.items()} == counts


def test_a_row_without_steps_has_a_gradient_of_nothing():
    scores = torch.tensor([2.0, 5.0], requires_grad=True)
    loss_sum, weight, _metrics = process_reward_loss(scores, torch.zeros(2))
    loss_sum.backward()
    assert (float(loss_sum.detach()), float(weight), scores.grad.tolist()) == (0.0, 0.0, [0.0, 0.0])
