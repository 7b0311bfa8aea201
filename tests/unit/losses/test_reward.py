import math

import pytest
import torch

from megavlm.losses.reward import calibration_sums, expected_calibration_error, reward_loss

NUM_PAIRS = 6


def example():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(NUM_PAIRS, generator=generator) for _ in range(2))


def test_equal_scores_cost_ln_2_and_pull_apart():
    scores_P, _ = example()
    chosen_P, rejected_P = scores_P.clone().requires_grad_(), scores_P.clone().requires_grad_()
    loss_sum, count, metrics = reward_loss(chosen_P, rejected_P)
    torch.testing.assert_close(loss_sum / count, torch.tensor(math.log(2)))
    loss_sum.backward()
    torch.testing.assert_close(chosen_P.grad, torch.full((NUM_PAIRS,), -0.5))
    torch.testing.assert_close(rejected_P.grad, torch.full((NUM_PAIRS,), 0.5))
    # A tie is not right.
    assert metrics["rewards/accuracies"] == 0


def test_is_the_likelihood_of_bradley_and_terry():
    chosen_P, rejected_P = example()
    strength_P, other_P = chosen_P.double().exp(), rejected_P.double().exp()
    loss_sum, count, metrics = reward_loss(chosen_P, rejected_P)
    torch.testing.assert_close(loss_sum.double(), -(strength_P / (strength_P + other_P)).log().sum(), rtol=1e-6, atol=0)
    assert count == NUM_PAIRS and metrics["rewards/accuracies"] == (chosen_P > rejected_P).sum()


def test_a_margin_moves_the_difference():
    chosen_P, rejected_P = example()
    margin_P = torch.linspace(0, 1, NUM_PAIRS)
    actual, _, metrics = reward_loss(chosen_P, rejected_P, margin_P)
    torch.testing.assert_close(actual, reward_loss(chosen_P - margin_P, rejected_P)[0])
    torch.testing.assert_close(metrics["rewards/margins"], (chosen_P - rejected_P).sum())


def test_centring_tells_scores_that_differ_by_a_constant_apart():
    chosen_P, rejected_P = example()
    shifted = reward_loss(chosen_P + 3, rejected_P + 3)[0]
    torch.testing.assert_close(reward_loss(chosen_P, rejected_P)[0], shifted, rtol=1e-5, atol=0)
    centred, centred_shifted = (
        reward_loss(chosen_P + shift, rejected_P + shift, center_rewards_coefficient=0.01)[0] for shift in (0, 3)
    )
    expected = 0.01 * ((chosen_P + rejected_P + 6) ** 2 - (chosen_P + rejected_P) ** 2).sum()
    torch.testing.assert_close(centred_shifted - centred, expected, rtol=1e-5, atol=0)


def test_bf16_scores_are_raised_first():
    chosen_P, rejected_P = (scores_P.bfloat16() for scores_P in example())
    actual, _, _ = reward_loss(chosen_P, rejected_P)
    assert torch.equal(actual, reward_loss(chosen_P.float(), rejected_P.float())[0])


def test_calibration_of_known_preferences():
    """Of ten pairs at confidence 0.8 eight are right, of four at 0.6 one: an error of 0, and one of 0.35."""
    differences = torch.tensor([math.log(4)] * 8 + [-math.log(4)] * 2 + [math.log(1.5)] + [-math.log(1.5)] * 3)
    sums = calibration_sums(differences, torch.zeros(14), num_bins=4)
    assert sums[:, 0].tolist() == [4, 0, 10, 0] and sums[:, 2].tolist() == [1, 0, 8, 0]
    error = expected_calibration_error(sums)
    assert error == pytest.approx(4 / 14 * 0.35, rel=1e-6)


def test_calibration_of_parts_adds_up():
    chosen_P, rejected_P = example()
    parts = [calibration_sums(chosen_P[part], rejected_P[part]) for part in (slice(0, 2), slice(2, None))]
    whole = calibration_sums(chosen_P, rejected_P)
    torch.testing.assert_close(parts[0] + parts[1], whole)
    assert whole.shape == (10, 3) and whole[:, 0].sum() == NUM_PAIRS


def test_certain_and_tied_preferences_have_a_bin():
    sums = calibration_sums(torch.tensor([500.0, 1.0]), torch.tensor([0.0, 1.0]))
    assert sums[-1].tolist() == [1, 1, 1] and sums[0].tolist() == [1, 0.5, 0.5]
    assert expected_calibration_error(sums) == 0
