"""Learning from pairs of answers by their likelihoods: the DPO family, and CPO, SimPO and ORPO without a reference.

Shape suffixes: T tokens of the whole row, L of this context-parallel rank, W this rank's part of the vocabulary,
Q sequences of the row (chosen and rejected answers in turn), P pairs that count.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch

from megavlm.config.objectives import loss_types
from megavlm.config.schema import Recipe
from megavlm.data.sample import Batch
from megavlm.losses.logprob import token_logprobs
from megavlm.losses.preference import PairLogprobs, PreferenceOptions, preference_loss
from megavlm.losses.reference_free import ReferenceFreeOptions, reference_free_loss
from megavlm.models.architecture import Architecture
from megavlm.parallel.context import local_part
from megavlm.parallel.groups import Groups
from megavlm.train.stages.sequences import counting_samples, num_sequences, predicts_answer, sequence_sums
from megavlm.train.stages.stage import Sums

PairLoss = Callable[[PairLogprobs], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]

REWARD_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


@dataclass(frozen=True)
class PreferenceTraining:
    """A stage on pairs.

    Attributes:
        groups: process groups.
        pair_loss: what is learned of the likelihoods of pairs.
        needs_reference: whether the rows carry what a reference says of their answers.
    """

    groups: Groups
    pair_loss: PairLoss
    needs_reference: bool
    look_ahead: ClassVar[None] = None
    census: ClassVar[None] = None
    split_gradients: ClassVar[None] = None
    memory: ClassVar[None] = None
    metric_sizes: ClassVar[dict[str, int]] = dict.fromkeys((*REWARD_METRICS, "logps/chosen", "logps/rejected"), 1)

    def loss(self, logits_LW: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        """Sum over the pairs of the row, and how many there are; each context rank has its share of both."""
        device, num_context = logits_LW.device, self.groups.context.size()
        pairs_P = counting_samples(batch).to(device)
        both_PQ = answer_logprobs(logits_LW, batch, self.groups).view(-1, 2)[pairs_P]
        lengths_PQ = answer_lengths(batch).to(device).view(-1, 2)[pairs_P]
        reference_PQ = torch.zeros_like(both_PQ)
        if self.needs_reference:
            assert batch.references_NQ is not None, "references are computed before training"
            reference_PQ = batch.references_NQ.to(device)[pairs_P]
        pairs = PairLogprobs(
            chosen_P=both_PQ[:, 0],
            rejected_P=both_PQ[:, 1],
            reference_chosen_P=reference_PQ[:, 0],
            reference_rejected_P=reference_PQ[:, 1],
            num_chosen_tokens_P=lengths_PQ[:, 0],
            num_rejected_tokens_P=lengths_PQ[:, 1],
        )
        loss_sum, count, metrics = self.pair_loss(pairs)
        metrics |= dict(zip(("logps/chosen", "logps/rejected"), both_PQ.detach().sum(0).unbind(), strict=True))
        sums = {name: value[None] / num_context for name, value in metrics.items()}
        return loss_sum / num_context, count / num_context, sums

    def count(self, batch: Batch) -> float:
        """As `Stage` says."""
        return float(len(counting_samples(batch)))

    def figures(self, sums: Sums, count: float) -> dict[str, float]:
        """Means over pairs."""
        return {name: float(value) / count for name, value in sums.items()}


def answer_logprobs(logits_LW: torch.Tensor, batch: Batch, groups: Groups) -> torch.Tensor:
    """Log-probability of each answer of a row, summed over the tokens that have a weight: fp32 [Q]."""
    context = groups.context
    labels_L, weights_L = (
        local_part(tensor_T, batch.cu_seqlens, context.size(), context.rank()).to(logits_LW.device)
        for tensor_T in (batch.labels_T, predicts_answer(batch))
    )
    return sequence_sums(token_logprobs(logits_LW, labels_L, groups.tensor) * weights_L, batch, groups)


def answer_lengths(batch: Batch) -> torch.Tensor:
    """Tokens of each answer of a row that have a weight: fp32 [Q]."""
    sums_T = torch.cat((torch.zeros(1), predicts_answer(batch).float().cumsum(0)))
    return sums_T[batch.cu_seqlens.long()].diff()[: num_sequences(batch)]


def build_dpo(recipe: Recipe, architecture: Architecture, groups: Groups) -> PreferenceTraining:
    """The losses of `preference.loss_type`, against the model as it was before training."""
    knobs = recipe.preference
    options = PreferenceOptions(
        loss_type=loss_types(recipe),
        loss_weights=knobs.loss_weights or None,
        beta=knobs.beta,
        label_smoothing=knobs.label_smoothing,
        discopop_tau=knobs.discopop_tau,
        rpo_alpha=knobs.rpo_alpha or None,
    )
    return PreferenceTraining(groups, lambda pairs: preference_loss(pairs, options), needs_reference=True)


def _build_reference_free(
    name: Literal["cpo", "simpo", "orpo"], recipe: Recipe, architecture: Architecture, groups: Groups
) -> PreferenceTraining:
    knobs = recipe.preference
    (loss_type,) = loss_types(recipe)  # one, as the recipe's checks have seen
    options = ReferenceFreeOptions(
        beta=knobs.beta,
        loss_type=loss_type,  # type: ignore[arg-type]
        cpo_alpha=knobs.cpo_alpha,
        simpo_gamma=knobs.simpo_gamma,
        label_smoothing=knobs.label_smoothing,
    )
    return PreferenceTraining(groups, lambda pairs: reference_free_loss(name, pairs, options), needs_reference=False)


build_cpo = partial(_build_reference_free, "cpo")
build_simpo = partial(_build_reference_free, "simpo")
build_orpo = partial(_build_reference_free, "orpo")
