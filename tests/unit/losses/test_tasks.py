"""Weights of tasks against the papers' formulae, written out in plain torch with numbers of their own."""

import math

import pytest
import torch
import torch.nn.functional as F

from megavlm.losses.tasks import gradient_norm_objective, ratio_weights, rescaled, task_sums, uncertainty_objective

LOSSES = torch.tensor([2.0, 0.5, 1.25], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.2, 2.0])
def test_ratio_weights_are_dynamic_weight_average(temperature):
    initial = torch.tensor([4.0, 1.0, 1.0], dtype=torch.float64)
    ratios = [0.5, 0.5, 1.25]
    total = sum(math.exp(ratio / temperature) for ratio in ratios)
    expected = [3 * math.exp(ratio / temperature) / total for ratio in ratios]
    found = ratio_weights(LOSSES, initial, temperature)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert found.mean().item() == pytest.approx(1) and found[2] > found[0] == found[1]


def test_uncertainty_is_the_likelihood_of_scaled_logits():
    """Equation 5 of 1705.07115 without its approximation is the softmax of logits / sigma^2; with it, equation 10."""
    shares, s = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.7, -0.4, 0.0], dtype=torch.float64)
    sigma = torch.exp(s / 2)
    expected = sum(
        share * (loss / one**2 + torch.log(one)) for share, loss, one in zip(shares, LOSSES, sigma, strict=True)
    )
    assert uncertainty_objective(LOSSES, shares, s).item() == pytest.approx(expected.item(), rel=1e-12)


def test_uncertainty_is_least_where_the_variance_is_twice_the_loss():
    s = torch.log(2 * LOSSES).requires_grad_()
    uncertainty_objective(LOSSES, torch.full((3,), 1 / 3, dtype=torch.float64), s).backward()
    torch.testing.assert_close(s.grad, torch.zeros_like(s), rtol=0, atol=1e-15)


def test_uncertainty_counts_tokens_alike():
    """Over tasks with their shares it is the mean over tokens of exp(-s) l + s / 2."""
    generator = torch.Generator().manual_seed(0)
    losses, tasks = torch.rand(50, generator=generator, dtype=torch.float64), torch.arange(50) % 3
    s = torch.tensor([0.7, -0.4, 0.2], dtype=torch.float64)
    expected = (torch.exp(-s[tasks]) * losses + s[tasks] / 2).mean()
    counts = task_sums(torch.ones(50), tasks, 3)
    found = uncertainty_objective(task_sums(losses, tasks, 3) / counts, counts / 50, s)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_gradient_norm_objective_on_a_real_layer(alpha):
    """Against algorithm 1 of 1711.02257 done by autograd through a shared layer, gradients of gradients included."""
    generator = torch.Generator().manual_seed(1)
    layer, inputs = torch.nn.Linear(5, 4).double(), torch.randn(7, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (3, 7), generator=generator)
    weights = torch.tensor([1.2, 0.5, 1.3], dtype=torch.float64, requires_grad=True)
    losses = [F.cross_entropy(layer(inputs), labels[task]) for task in range(3)]
    initial = torch.tensor([1.0, 2.0, 1.5], dtype=torch.float64)
    norms = torch.stack([torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm() for loss in losses])

    scaled = torch.stack(
        [
            torch.autograd.grad(weight * loss, layer.weight, create_graph=True)[0].norm()
            for weight, loss in zip(weights, losses, strict=True)
        ]
    )
    progress = torch.stack(losses).detach() / initial
    target = (scaled.mean() * (progress / progress.mean()) ** alpha).detach()
    F.l1_loss(scaled, target, reduction="sum").backward()

    ours = weights.detach().clone().requires_grad_()
    gradient_norm_objective(ours, norms, progress, alpha).backward()
    torch.testing.assert_close(ours.grad, weights.grad, rtol=1e-10, atol=1e-12)
    assert len(set(ours.grad.sign().tolist())) == 2


def test_rescaled_has_mean_one():
    found = rescaled(LOSSES)
    assert found.mean().item() == pytest.approx(1) and (found / LOSSES).std() < 1e-12


def test_task_sums():
    found = task_sums(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 2, 2, 0]), 4)
    assert found.tolist() == [9, 0, 6, 0] and found.dtype == torch.float64
