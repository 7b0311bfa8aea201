"""Losses on preferences against TRL's own code on the same log-probabilities: values and gradients.

TRL's methods are called on the few attributes of a trainer that they read, with a model that gives back
log-probabilities of tokens which the test made: so its formulae, masks and means run, and none is repeated here.
"""

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from megavlm.losses.kto import KtoOptions, kl_estimate, kl_sums, kto_loss
from megavlm.losses.preference import PAIR_LOSSES, PairLogprobs, PreferenceOptions, preference_loss
from megavlm.losses.process_reward import process_reward_loss
from megavlm.losses.reference_free import ReferenceFreeOptions, reference_free_loss
from megavlm.losses.reward import reward_loss
from megavlm.losses.sequences import length_desensitised_weights, samples_of_tokens, sums_per_sample
from tests.evidence import record, row

# Of the loss, and of the largest gradient; fp32, and the order of sums differs.
RELATIVE = 1e-5
NUM_PAIRS, NUM_TOKENS, PROMPT = 4, 12, 3
# Tokens of the chosen answers, then of the rejected ones.
LENGTHS = torch.tensor([9, 4, 6, 2, 5, 7, 6, 8])


@pytest.fixture(scope="module")
def trl():
    """TRL's trainers. Importing them takes seconds, which collecting the tests of this folder should not."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        from trl.experimental.cpo import CPOTrainer
        from trl.experimental.orpo import ORPOTrainer
        from trl.trainer.dpo_trainer import DPOTrainer
        from trl.trainer.kto_trainer import KTOTrainer
        from trl.trainer.reward_trainer import RewardTrainer
    return SimpleNamespace(cpo=CPOTrainer, orpo=ORPOTrainer, dpo=DPOTrainer, kto=KTOTrainer, reward=RewardTrainer)


def answers(lengths):
    """[2P, T] mask of the answers' tokens, after a prompt of the same length in every row."""
    position = torch.arange(NUM_TOKENS)
    return (position >= PROMPT) & (position < PROMPT + lengths[:, None])


def tokens(seed, mask):
    """Log-probabilities of tokens 1 to T - 1, as a model gives them: 0 where there is no answer."""
    generator = torch.Generator().manual_seed(seed)
    return -2 * torch.rand(len(mask), NUM_TOKENS - 1, generator=generator) * mask[:, 1:]


class Model(torch.nn.Module):
    """Gives back log-probabilities instead of computing them."""

    training = True
    is_gradient_checkpointing = False

    def __init__(self, *log_probs):
        super().__init__()
        self.log_probs = list(log_probs)

    def forward(self, **inputs):
        log_probs = self.log_probs.pop(0)
        nothing = torch.zeros_like(log_probs)
        return SimpleNamespace(log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), gather=lambda tensor: tensor, gather_for_metrics=lambda tensor: tensor
)


def trainer(**attributes):
    return SimpleNamespace(
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        ref_adapter_name=None,
        maybe_activation_offload_context=nullcontext(),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def dpo_of_trl(trl, policy, reference, mask, loss_types, weights, ld_alpha, **attributes):
    args = SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05)
    # A model's log-probability of what is no answer is a constant 0.
    model = Model(policy * mask[:, 1:])
    fake = trainer(
        model=model,
        ref_model=Model(reference),
        loss_types=list(loss_types),
        loss_weights=list(weights),
        ld_alpha=ld_alpha,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        args=args,
        **attributes,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask, dtype=torch.long),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask.long(),
    }
    loss = trl.dpo._compute_loss(fake, model, inputs, False)
    return loss, {name: values[-1] for name, values in fake._metrics["train"].items()}


def answer_sums(values, mask, ld_alpha=None):
    """Summed log-probabilities [2P] from rows that are packed one after the other."""
    width = values.shape[1]
    borders = torch.arange(0, values.numel() + 1, width, dtype=torch.int32)
    counted = mask[:, 1:].flatten()
    shared = torch.minimum(*mask.sum(1).chunk(2)).repeat(2)
    weights = length_desensitised_weights(counted, borders, shared, 1.0 if ld_alpha is None else ld_alpha)
    return sums_per_sample(values.flatten() * weights, samples_of_tokens(borders), len(values))


def pairs_of(policy, reference, mask, ld_alpha=None):
    lengths = mask.sum(1)
    return PairLogprobs(
        *answer_sums(policy, mask, ld_alpha).chunk(2),
        *answer_sums(reference, mask, ld_alpha).chunk(2),
        *lengths.chunk(2),
        mean_chosen_tokens=float(lengths[:NUM_PAIRS].float().mean()),
    )


def assert_equal(name, ours, theirs, values, reference="TRL 1.16"):
    """`ours` and `theirs` are losses of what `name` says; `values` the leaf that both came from."""
    (actual,), (expected,) = (
        torch.autograd.grad(ours, [values], retain_graph=True),
        torch.autograd.grad(theirs, [values]),
    )
    largest = expected.abs().max()
    assert largest > 0
    distances = {
        "loss": float((ours - theirs).abs() / theirs.abs()),
        "gradient": float((actual - expected).abs().max() / largest),
    }
    rows = [
        row(
            f"loss {name}: {measure}",
            distance,
            unit="relative difference on the same log-probabilities or scores",
            required=f"<= {RELATIVE:g}",
            reference=reference,
            reference_value=0.0,
            command="make test TESTS=tests/parity",
        )
        for measure, distance in distances.items()
    ]
    record("parity", rows)
    assert max(distances.values()) <= RELATIVE, distances


CASES = {name: ((name,), (1.0,), 0.0, None) for name in PAIR_LOSSES if name != "exo_pair"} | {
    "exo_pair": (("exo_pair",), (1.0,), 0.1, None),
    "robust with smoothing": (("robust",), (1.0,), 0.1, None),
    "aot with smoothing": (("aot",), (1.0,), 0.1, None),
    "aot_unpaired with smoothing": (("aot_unpaired",), (1.0,), 0.1, None),
    "length-desensitised": (("sigmoid",), (1.0,), 0.0, 0.3),
    "three with weights": (("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.0), 0.0, None),
}


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("case", CASES)
def test_pairs(trl, case, beta):
    loss_types, weights, smoothing, ld_alpha = CASES[case]
    mask = answers(LENGTHS)
    policy, reference = tokens(1, mask).requires_grad_(), tokens(2, mask)
    theirs, logged = dpo_of_trl(
        trl, policy, reference, mask, loss_types, weights, ld_alpha, beta=beta, label_smoothing=smoothing
    )
    options = PreferenceOptions(loss_types, weights, beta=beta, label_smoothing=smoothing)
    loss_sum, count, metrics = preference_loss(pairs_of(policy, reference, mask, ld_alpha), options)
    assert_equal(f"dpo, {case}, beta {beta}", loss_sum / count, theirs, policy)
    for name, value in metrics.items():
        assert float(value / count) == pytest.approx(logged[name], rel=RELATIVE)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "simpo"])
def test_cpo_and_simpo(trl, loss_type, smoothing):
    mask = answers(LENGTHS)
    policy = tokens(1, mask).requires_grad_()
    pairs = pairs_of(policy, policy.detach(), mask)
    scored = pairs.per_token() if loss_type in ("ipo", "simpo") else pairs
    fake = trainer(alpha=0.0, beta=0.6, loss_type=loss_type, simpo_gamma=0.4, label_smoothing=smoothing)
    theirs_P, theirs_chosen_P, theirs_rejected_P = trl.cpo.cpo_loss(fake, scored.chosen_P, scored.rejected_P)
    is_simpo = loss_type == "simpo"
    options = ReferenceFreeOptions(
        beta=0.6,
        loss_type="sigmoid" if is_simpo else loss_type,
        cpo_alpha=0.0,
        simpo_gamma=0.4,
        label_smoothing=smoothing,
    )
    loss_sum, count, metrics = reference_free_loss("simpo" if is_simpo else "cpo", pairs, options)
    stage = "simpo" if is_simpo else f"cpo, {loss_type}"
    assert_equal(f"{stage}, label smoothing {smoothing}", loss_sum / count, theirs_P.mean(), policy)
    torch.testing.assert_close(metrics["rewards/chosen"], theirs_chosen_P.sum(), rtol=RELATIVE, atol=0)
    torch.testing.assert_close(metrics["rewards/rejected"], theirs_rejected_P.sum(), rtol=RELATIVE, atol=0)


def test_orpo(trl):
    mask = answers(LENGTHS)
    policy = tokens(1, mask).requires_grad_()
    pairs = pairs_of(policy, policy.detach(), mask)
    means = pairs.per_token()
    theirs_P, *_ = trl.orpo.odds_ratio_loss(trainer(beta=0.3), means.chosen_P, means.rejected_P)
    theirs = pairs.chosen_nll_P.mean() - theirs_P.mean()
    loss_sum, count, _ = reference_free_loss("orpo", pairs, ReferenceFreeOptions(beta=0.3))
    assert_equal("orpo", loss_sum / count, theirs, policy)


@pytest.mark.parametrize("higher_kl", [False, True])
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto(trl, loss_type, higher_kl):
    mask = answers(LENGTHS)
    good = torch.tensor([True, False, False, True, True, False, True, False])
    policy, reference = tokens(1, mask).requires_grad_(), tokens(2, mask)
    mismatched = [tokens(3, mask), tokens(4, mask)]
    mismatched.sort(key=lambda values: float(values.sum()), reverse=higher_kl)
    uses_kl = loss_type == "kto"
    # The trainer asks for the mismatched answers first.
    model = Model(*([mismatched[0]] if uses_kl else []), policy * mask[:, 1:])
    fake = trainer(
        model=model,
        ref_model=Model(*([mismatched[1]] if uses_kl else []), reference),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        loss_type=loss_type,
        beta=0.4,
        calculate_KL=uses_kl,
        desirable_weight=1.3,
        undesirable_weight=0.7,
    )
    fake._compute_kl_logps = lambda model, batch: trl.kto._compute_kl_logps(fake, model, batch)
    ids, ones = torch.zeros_like(mask, dtype=torch.long), torch.ones_like(mask)
    inputs = {
        "input_ids": ids,
        "attention_mask": ones,
        "completion_mask": mask.long(),
        "KL_input_ids": ids,
        "KL_attention_mask": ones,
        "KL_completion_mask": mask.long(),
        "label": good,
    }
    theirs = trl.kto._compute_loss(fake, model, inputs, False)
    kl = kl_estimate(*kl_sums(*(answer_sums(values, mask) for values in mismatched)))
    assert (kl > 0) == higher_kl
    sums = answer_sums(policy, mask), answer_sums(reference, mask)
    loss_sum, count, metrics = kto_loss(*sums, good, kl, KtoOptions(loss_type, 0.4, 1.3, 0.7))
    where = "above" if higher_kl else "below"
    assert_equal(f"kto, {loss_type}, KL {where} 0", loss_sum / count, theirs, policy)
    logged = fake._metrics["train"]
    for kind in ("chosen", "rejected"):
        ours = float(metrics[f"rewards/{kind}"] / metrics[f"count/{kind}"])
        assert ours == pytest.approx(logged[f"rewards/{kind}"][-1], rel=RELATIVE)


@pytest.mark.parametrize("coefficient", [None, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
def test_reward_model(trl, with_margin, coefficient):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2 * NUM_PAIRS, generator=generator).requires_grad_()
    margin = torch.rand(NUM_PAIRS, generator=generator)
    fake = trainer(args=SimpleNamespace(center_rewards_coefficient=coefficient), model=SimpleNamespace(training=True))

    def model(**inputs):
        return SimpleNamespace(logits=scores[:, None])

    inputs = {"attention_mask": torch.ones(2 * NUM_PAIRS, 3)} | ({"margin": margin} if with_margin else {})
    theirs = trl.reward.compute_loss(fake, model, inputs)
    loss_sum, count, metrics = reward_loss(*scores.chunk(2), margin if with_margin else None, coefficient or 0.0)
    with_what = f"{'with' if with_margin else 'without'} margin, centring {coefficient or 0}"
    assert_equal(f"rm, {with_what}", loss_sum / count, theirs, scores)
    assert float(metrics["rewards/accuracies"] / count) == fake._metrics["train"]["accuracy"][-1]
    assert float(metrics["rewards/margins"] / count) == pytest.approx(fake._metrics["train"]["margin"][-1], rel=1e-5)


@pytest.mark.parametrize("batch_items", [None, 20])
def test_process_reward_model(batch_items):
    """TRL's PRMTrainer has no loss of its own: it is transformers' of token classification, over two labels."""
    from transformers.loss.loss_utils import ForTokenClassification

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, NUM_TOKENS, 2, generator=generator).mul(3).requires_grad_()
    labels = torch.randint(-3, 2, (4, NUM_TOKENS), generator=generator).clamp(min=-1)
    counted = labels >= 0
    theirs = ForTokenClassification(
        logits, labels.where(counted, -100), SimpleNamespace(num_labels=2), num_items_in_batch=batch_items
    )
    scores = logits[..., 1] - logits[..., 0]
    loss_sum, weight, metrics = process_reward_loss(scores.flatten(), torch.where(counted, 2 * labels - 1, 0).flatten())
    assert float(weight) == int(counted.sum()) > 5
    name = f"prm, {'of the step' if batch_items else 'of the batch'}"
    assert_equal(name, loss_sum / (batch_items or weight), theirs, logits, "transformers, ForTokenClassificationLoss")
    # PRMTrainer's compute_accuracy: the larger logit against the label, over all that has one
    right = (logits.argmax(-1) == labels)[counted]
    assert float(metrics["agrees/right"] + metrics["agrees/wrong"]) == int(right.sum())
    assert float(metrics["count/right"]) == int((labels == 1).sum())
    assert float(metrics["agrees/right"]) == int(right[labels[counted] == 1].sum())
