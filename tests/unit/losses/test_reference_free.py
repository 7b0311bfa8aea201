import math

import pytest
import torch

from megavlm.errors import UseError
from megavlm.losses.preference import PairLogprobs
from megavlm.losses.reference_free import (
    REFERENCE_FREE_LOSSES,
    ReferenceFreeOptions,
    log_one_minus_exp,
    reference_free_loss,
)

NUM_PAIRS = 4


def example(scale=8.0):
    generator = torch.Generator().manual_seed(0)
    chosen_P, rejected_P = (-scale * torch.rand(NUM_PAIRS, generator=generator) - 1 for _ in range(2))
    # A reference that none of these may read.
    nothing_P = torch.full((NUM_PAIRS,), torch.nan)
    lengths = torch.tensor([3, 5, 4, 7]), torch.tensor([4, 2, 6, 3])
    return PairLogprobs(chosen_P.requires_grad_(), rejected_P.requires_grad_(), nothing_P, nothing_P, *lengths)


def nll(pairs):
    return -pairs.chosen_P / pairs.num_chosen_tokens_P


def test_cpo_is_dpo_without_a_reference_and_likelihood():
    pairs = example()
    loss_sum, count, metrics = reference_free_loss("cpo", pairs, ReferenceFreeOptions(beta=0.3, cpo_alpha=0.7))
    expected = torch.log1p(torch.exp(-0.3 * (pairs.chosen_P - pairs.rejected_P))) + 0.7 * nll(pairs)
    torch.testing.assert_close(loss_sum, expected.sum(), rtol=1e-6, atol=0)
    assert count == NUM_PAIRS
    torch.testing.assert_close(metrics["rewards/chosen"], 0.3 * pairs.chosen_P.detach().sum(), rtol=1e-6, atol=0)


def test_simpo_has_a_target_margin_on_means():
    """At a margin of gamma the loss is ln 2."""
    pairs = example()
    gamma = 2.0 * (pairs.chosen_P[0].item() / 3 - pairs.rejected_P[0].item() / 4)
    first = PairLogprobs(*(value[:1] for value in list(pairs.__dict__.values())[:6]))
    options = ReferenceFreeOptions(beta=2.0, cpo_alpha=0.0, simpo_gamma=gamma)
    loss_sum, _, metrics = reference_free_loss("simpo", first, options)
    torch.testing.assert_close(loss_sum, torch.tensor(math.log(2)), rtol=1e-6, atol=0)
    torch.testing.assert_close(metrics["rewards/margins"], torch.tensor(gamma), rtol=1e-5, atol=0)


def test_orpo_is_the_odds_ratio_and_likelihood():
    """From the definition of odds, p / (1 - p), in fp64."""
    pairs = example()
    loss_sum, _, _ = reference_free_loss("orpo", pairs, ReferenceFreeOptions(beta=0.25))
    chosen_p = torch.exp(pairs.chosen_P.double() / pairs.num_chosen_tokens_P)
    rejected_p = torch.exp(pairs.rejected_P.double() / pairs.num_rejected_tokens_P)
    odds_ratio = (chosen_p / (1 - chosen_p)) / (rejected_p / (1 - rejected_p))
    expected = (nll(pairs).double() + 0.25 * torch.log1p(1 / odds_ratio)).sum()
    torch.testing.assert_close(loss_sum.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", REFERENCE_FREE_LOSSES)
def test_gradients_favour_the_chosen_answer_and_read_no_reference(name):
    pairs = example()
    reference_free_loss(name, pairs, ReferenceFreeOptions())[0].backward()
    assert (pairs.chosen_P.grad < 0).all() and (pairs.rejected_P.grad > 0).all()


@pytest.mark.parametrize("value", [-1e-7, -1e-3, -0.6931, -0.6932, -5.0, -15.0])
def test_log_one_minus_exp_near_and_far(value):
    value = torch.tensor(value, requires_grad=True)
    exact = torch.log(-torch.expm1(value.detach().double()))
    exact_gradient = -torch.exp(value.detach().double()) / -torch.expm1(value.detach().double())
    result = log_one_minus_exp(value)
    result.backward()
    torch.testing.assert_close(result.detach().double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(value.grad.double(), exact_gradient, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("knobs", "named"),
    [({"loss_type": "robust"}, "loss_type"), ({"beta": -1.0}, "beta"), ({"label_smoothing": 0.7}, "label_smoothing")],
)
def test_wrong_knobs_are_named(knobs, named):
    with pytest.raises(UseError, match=f"^{named}: got "):
        ReferenceFreeOptions(**knobs)
