import math

import pytest
import torch

from megavlm.errors import UseError
from megavlm.losses.preference import PAIR_LOSSES, PairLogprobs, PreferenceOptions, preference_loss

NUM_PAIRS = 5
LN_2 = math.log(2)
# What each loss is where the policy still is the reference, at beta 0.1: worked out by hand from the formulae.
AT_THE_REFERENCE = {
    "sigmoid": LN_2,
    "sigmoid_norm": LN_2,
    "hinge": 1.0,
    "ipo": 25.0,
    "robust": LN_2,
    "nca_pair": 2 * LN_2,
    "bco_pair": 2 * LN_2,
    "sppo_hard": 50.0,
    "aot": LN_2,
    "aot_unpaired": LN_2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * LN_2 + 0.5,
    "exo_pair": 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2),
}


def options_for(name, **others):
    return PreferenceOptions((name,), label_smoothing=0.2 if name == "exo_pair" else 0.0, **others)


def example(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    values = [-20 * torch.rand(NUM_PAIRS, generator=generator, dtype=dtype) - 1 for _ in range(4)]
    return PairLogprobs(*values, torch.tensor([3, 5, 4, 7, 2]), torch.tensor([4, 2, 6, 3, 9]))


def at_the_reference():
    pairs = example()
    return PairLogprobs(
        pairs.chosen_P,
        pairs.rejected_P,
        pairs.chosen_P,
        pairs.rejected_P,
        pairs.num_chosen_tokens_P,
        pairs.num_rejected_tokens_P,
    )


@pytest.mark.parametrize("name", AT_THE_REFERENCE)
def test_before_the_first_step(name):
    loss_sum, count, metrics = preference_loss(at_the_reference(), options_for(name))
    assert loss_sum.dtype == count.dtype == torch.float32 and count == NUM_PAIRS
    torch.testing.assert_close(loss_sum / count, torch.tensor(AT_THE_REFERENCE[name]), rtol=1e-6, atol=0)
    assert {key: float(value) for key, value in metrics.items()} == {
        "rewards/chosen": 0,
        "rewards/rejected": 0,
        "rewards/margins": 0,
        "rewards/accuracies": 0,
    }


def test_every_loss_has_its_first_value():
    assert set(AT_THE_REFERENCE) | {"sft"} == set(PAIR_LOSSES)


# DiscoPOP is not monotonic: near the reference, at its own temperature, it first draws the answers together.
@pytest.mark.parametrize("name", sorted(set(PAIR_LOSSES) - {"sft", "discopop"}))
def test_the_first_step_moves_towards_the_chosen_answer(name):
    pairs = at_the_reference()
    pairs.chosen_P.requires_grad_()
    reference_P = pairs.chosen_P.detach()
    rejected_P = pairs.rejected_P.clone().requires_grad_()
    pairs = PairLogprobs(
        pairs.chosen_P,
        rejected_P,
        reference_P,
        pairs.rejected_P,
        pairs.num_chosen_tokens_P,
        pairs.num_rejected_tokens_P,
    )
    preference_loss(pairs, options_for(name))[0].backward()
    assert (rejected_P.grad > 0).all()
    # APO-down lets the chosen answer fall, too, but less: at the reference both parts cancel out.
    assert (pairs.chosen_P.grad == 0).all() if name == "apo_down" else (pairs.chosen_P.grad < 0).all()


def test_metrics_are_sums_of_rewards():
    pairs = example()
    _, _, metrics = preference_loss(pairs, PreferenceOptions(beta=0.3))
    chosen_P = 0.3 * (pairs.chosen_P - pairs.reference_chosen_P)
    rejected_P = 0.3 * (pairs.rejected_P - pairs.reference_rejected_P)
    expected = {
        "rewards/chosen": chosen_P.sum(),
        "rewards/rejected": rejected_P.sum(),
        "rewards/margins": (chosen_P - rejected_P).sum(),
        "rewards/accuracies": (chosen_P > rejected_P).sum(),
    }
    assert 0 < expected["rewards/accuracies"] < NUM_PAIRS
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value.float(), rtol=1e-5, atol=1e-5)


def test_label_smoothing_means_two_things():
    """cDPO mixes the losses of both orders; robust DPO subtracts the flipped one, so that the mean is the clean one."""
    pairs = example()
    margin_P = 0.1 * pairs.ratio_margin_P
    clean_P, flipped_P = torch.log1p(torch.exp(-margin_P)), torch.log1p(torch.exp(margin_P))
    actual = {name: PAIR_LOSSES[name](pairs, PreferenceOptions(label_smoothing=0.2)) for name in ("sigmoid", "robust")}
    torch.testing.assert_close(actual["sigmoid"], 0.8 * clean_P + 0.2 * flipped_P)
    torch.testing.assert_close(actual["robust"], (0.8 * clean_P - 0.2 * flipped_P) / 0.6)
    swapped = PairLogprobs(
        pairs.rejected_P,
        pairs.chosen_P,
        pairs.reference_rejected_P,
        pairs.reference_chosen_P,
        pairs.num_rejected_tokens_P,
        pairs.num_chosen_tokens_P,
    )
    noisy_P = 0.8 * actual["robust"] + 0.2 * PAIR_LOSSES["robust"](swapped, PreferenceOptions(label_smoothing=0.2))
    torch.testing.assert_close(noisy_P, clean_P)


def test_losses_are_combined_by_weight():
    pairs = example()
    parts = [preference_loss(pairs, PreferenceOptions((name,)))[0].double() for name in ("sigmoid", "bco_pair", "sft")]
    # The weights of MPO's recipe.
    weights = (0.8, 0.2, 1.0)
    combined, count, _ = preference_loss(pairs, PreferenceOptions(("sigmoid", "bco_pair", "sft"), weights))
    expected = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(combined.double(), expected, rtol=1e-6, atol=0)
    assert count == NUM_PAIRS
    unweighted, _, _ = preference_loss(pairs, PreferenceOptions(("sigmoid", "bco_pair", "sft")))
    torch.testing.assert_close(unweighted.double(), sum(parts), rtol=1e-6, atol=0)


def test_rpo_adds_the_likelihood_of_the_chosen_answer():
    pairs = example()
    plain, _, _ = preference_loss(pairs, PreferenceOptions())
    with_nll, _, _ = preference_loss(pairs, PreferenceOptions(rpo_alpha=0.5))
    nll = -(pairs.chosen_P / pairs.num_chosen_tokens_P).sum()
    torch.testing.assert_close(with_nll - plain, (0.5 * nll).float(), rtol=1e-5, atol=0)


def test_the_likelihood_as_a_mean_over_the_tokens_of_all_pairs():
    pairs = example()
    num_tokens = pairs.num_chosen_tokens_P.double()
    pairs = PairLogprobs(
        pairs.chosen_P,
        pairs.rejected_P,
        pairs.reference_chosen_P,
        pairs.reference_rejected_P,
        num_tokens,
        pairs.num_rejected_tokens_P,
        mean_chosen_tokens=float(num_tokens.mean()),
    )
    loss_sum, count, _ = preference_loss(pairs, PreferenceOptions(("sft",)))
    expected = -pairs.chosen_P.sum() / num_tokens.sum()
    torch.testing.assert_close(loss_sum / count, expected.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", sorted(set(PAIR_LOSSES) - {"aot", "aot_unpaired"}))
def test_sums_of_microbatches_are_the_sum_of_the_batch(name):
    pairs = example()
    whole, _, _ = preference_loss(pairs, options_for(name))
    parts = []
    for part in (slice(0, 2), slice(2, None)):
        tensors = [value[part] for value in pairs.__dict__.values() if value is not None]
        parts.append(preference_loss(PairLogprobs(*tensors), options_for(name))[0])
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=0)


def test_bf16_is_raised_to_fp32_first():
    pairs = example(torch.float32)
    rounded = PairLogprobs(*(v.bfloat16() if v is not None else v for v in list(pairs.__dict__.values())[:6]))
    raised = PairLogprobs(*(v.bfloat16().float() if v is not None else v for v in list(pairs.__dict__.values())[:6]))
    actual, _, _ = preference_loss(rounded, PreferenceOptions())
    assert actual.dtype == torch.float32 and torch.equal(actual, preference_loss(raised, PreferenceOptions())[0])


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("sign", [-1, 1])
def test_far_from_the_reference_gradients_stay_finite(name, sign):
    pairs = example(torch.float32)
    chosen_P = (pairs.reference_chosen_P + sign * 800).requires_grad_()
    rejected_P = (pairs.reference_rejected_P - sign * 800).requires_grad_()
    pairs = PairLogprobs(
        chosen_P,
        rejected_P,
        pairs.reference_chosen_P,
        pairs.reference_rejected_P,
        pairs.num_chosen_tokens_P,
        pairs.num_rejected_tokens_P,
    )
    loss_sum, _, _ = preference_loss(pairs, options_for(name))
    loss_sum.backward()
    if name == "discopop" and sign < 0:
        # exp(160) has no place in fp32, and its weight is 0: the paper's formula, as it stands in TRL, too.
        assert not loss_sum.isfinite()
    else:
        assert loss_sum.isfinite()
        assert chosen_P.grad.isfinite().all() and (name == "sft" or rejected_P.grad.isfinite().all())


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"loss_type": ("sigmoid", "dpo")}, "loss_type"),
        ({"loss_type": ()}, "loss_type"),
        ({"loss_weights": (1.0, 2.0)}, "loss_weights"),
        ({"beta": 0.0}, "beta"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"loss_type": ("exo_pair",)}, "label_smoothing"),
        ({"discopop_tau": 0.0}, "discopop_tau"),
    ],
)
def test_wrong_knobs_are_named(knobs, named):
    with pytest.raises(UseError, match=f"^{named}: got "):
        PreferenceOptions(**knobs)
