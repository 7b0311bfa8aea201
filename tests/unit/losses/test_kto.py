import pytest
import torch

from megavlm.errors import UseError
from megavlm.losses.kto import KtoOptions, kl_estimate, kl_sums, kto_loss

NUM_ANSWERS = 6
GOOD = torch.tensor([True, False, True, True, False, False])


def example():
    generator = torch.Generator().manual_seed(0)
    return (-9 * torch.rand(NUM_ANSWERS, generator=generator) - 1 for _ in range(2))


def test_is_the_formula_of_the_paper():
    """Equation 7 with the value function of equation 8, answer by answer."""
    policy_S, reference_S = example()
    options = KtoOptions(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    loss_sum, count, metrics = kto_loss(policy_S, reference_S, GOOD, torch.tensor(0.4), options)
    expected = 0.0
    for policy, reference, good in zip(policy_S.double(), reference_S.double(), GOOD, strict=True):
        reward = policy - reference
        if good:
            expected += 1.5 * (1 - torch.sigmoid(0.3 * (reward - 0.4)))
        else:
            expected += 0.5 * (1 - torch.sigmoid(0.3 * (0.4 - reward)))
    torch.testing.assert_close(loss_sum.double(), expected, rtol=1e-6, atol=0)
    assert count == NUM_ANSWERS and metrics["count/chosen"] == 3 and metrics["count/rejected"] == 3
    rewards = 0.3 * (policy_S - reference_S)
    torch.testing.assert_close(metrics["rewards/chosen"], rewards[GOOD].sum(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["rewards/rejected"], rewards[~GOOD].sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_before_the_first_step_every_answer_costs_one_half(loss_type):
    policy_S, _ = example()
    policy_S.requires_grad_()
    options = KtoOptions(loss_type)
    loss_sum, count, _ = kto_loss(policy_S, policy_S.detach(), GOOD, torch.tensor(0.0), options)
    assert loss_sum / count == 0.5
    loss_sum.backward()
    assert ((policy_S.grad < 0) == GOOD).all() and (policy_S.grad != 0).all()


def test_unpaired_apo_reads_no_kl():
    policy_S, reference_S = example()
    options = KtoOptions("apo_zero_unpaired")
    losses = [kto_loss(policy_S, reference_S, GOOD, torch.tensor(kl), options)[0] for kl in (0.0, 5.0)]
    assert torch.equal(*losses)
    assert not torch.equal(losses[0], kto_loss(policy_S, reference_S, GOOD, torch.tensor(5.0), KtoOptions())[0])


def test_the_estimate_is_a_mean_over_the_batch_and_not_negative():
    reference_S, policy_S = example()
    policy_S.requires_grad_()
    parts = [kl_sums(policy_S[part], reference_S[part]) for part in (slice(0, 2), slice(2, None))]
    estimate = kl_estimate(parts[0][0] + parts[1][0], parts[0][1] + parts[1][1])
    mean = (policy_S - reference_S).mean().detach()
    assert mean < 0 and estimate == 0
    torch.testing.assert_close(kl_estimate(*kl_sums(reference_S, policy_S)), -mean, rtol=1e-5, atol=0)
    assert not estimate.requires_grad


def test_answers_of_one_kind_only():
    policy_S, reference_S = example()
    loss_sum, _, metrics = kto_loss(policy_S, reference_S, ~GOOD & GOOD, torch.tensor(0.0), KtoOptions())
    assert loss_sum.isfinite() and metrics["rewards/chosen"] == 0 and metrics["count/chosen"] == 0


@pytest.mark.parametrize(("knobs", "named"), [({"loss_type": "bco"}, "loss_type"), ({"beta": 0.0}, "beta")])
def test_wrong_knobs_are_named(knobs, named):
    with pytest.raises(UseError, match=f"^{named}: got "):
        KtoOptions(**knobs)
