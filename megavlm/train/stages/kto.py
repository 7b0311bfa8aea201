"""Learning from single answers that are marked good or bad: KTO, and APO-zero without pairs.

A row is two sequences: its own answer, and for KTO's reference point the answer of another row, which no gradient goes
through. The point is that of the whole global batch: the second sequences go through the model before the step.

Shape suffixes: W this rank's part of the vocabulary, L tokens of this context-parallel rank, S answers that count.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from megavlm.config.numerics import row_multiples
from megavlm.config.objectives import loss_types
from megavlm.config.schema import Recipe
from megavlm.data.dataset import Dataset
from megavlm.data.packing import part_of
from megavlm.data.sample import Batch
from megavlm.losses.kto import KtoOptions, kl_estimate, kl_sums, kto_loss
from megavlm.models.architecture import Architecture
from megavlm.parallel.groups import Groups
from megavlm.train.stages.preference import answer_logprobs
from megavlm.train.stages.sequences import counting_samples
from megavlm.train.stages.stage import Sums

OWN, OTHER = 0, 1
"""Numbers of a row's sequences."""


@dataclass(frozen=True)
class ReferencePoint:
    """KTO's estimate of how far the model is from its reference, from answers that do not fit their questions.

    Attributes:
        groups: process groups.
        image_token_id: of visual tokens.
        total_multiple: what a packed row is padded to a multiple of.
    """

    groups: Groups
    image_token_id: int
    total_multiple: int

    def read(self, batch: Batch) -> Batch:
        """The answers of other rows."""
        return part_of(batch, OTHER, self.image_token_id, self.total_multiple)

    def remaining(self, batch: Batch, ahead: torch.Tensor, rows: Dataset) -> Batch:
        """The row's own answers."""
        return part_of(batch, OWN, self.image_token_id, self.total_multiple)

    def new_sums(self, num_samples: int, device: torch.device) -> torch.Tensor:
        """Of log ratios, and of answers, however many there are."""
        return torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, sums: torch.Tensor, logits_LW: torch.Tensor, batch: Batch) -> None:
        """Sum of log ratios, and number of answers; each context rank has its share of both."""
        policy_S, reference_S = _both(logits_LW, batch, self.groups, OTHER)
        sums += torch.stack(kl_sums(policy_S, reference_S)).double() / self.groups.context.size()

    def result(self, sums: torch.Tensor) -> torch.Tensor:
        """The reference point."""
        return kl_estimate(sums[0], sums[1]).float()


@dataclass(frozen=True)
class MarkedAnswers:
    """The `kto` stage."""

    groups: Groups
    options: KtoOptions
    look_ahead: ReferencePoint
    census: ClassVar[None] = None
    split_gradients: ClassVar[None] = None
    memory: ClassVar[None] = None
    metric_sizes: ClassVar[dict[str, int]] = dict.fromkeys(
        ("rewards/chosen", "rewards/rejected", "count/chosen", "count/rejected", "kl"), 1
    )

    def loss(self, logits_LW: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        """Sum over the answers of the row, and how many there are; each context rank has its share of both."""
        num_context, device = self.groups.context.size(), logits_LW.device
        assert batch.ahead is not None
        policy_S, reference_S = _both(logits_LW, batch, self.groups, OWN)
        is_good_S = (batch.targets_N[counting_samples(batch)] > 0).to(device)
        kl = batch.ahead.to(device)
        loss_sum, count, metrics = kto_loss(policy_S, reference_S, is_good_S, kl, self.options)
        metrics["kl"] = kl * count
        sums = {name: value[None] / num_context for name, value in metrics.items()}
        return loss_sum / num_context, count / num_context, sums

    def count(self, batch: Batch) -> float:
        """As `Stage` says."""
        return float(len(counting_samples(batch)))

    def figures(self, sums: Sums, count: float) -> dict[str, float]:
        """Means of rewards over the good and over the bad answers, and the reference point."""
        found = {"kl": float(sums["kl"]) / count}
        for kind in ("chosen", "rejected"):
            number = float(sums[f"count/{kind}"])
            if number:
                found[f"rewards/{kind}"] = float(sums[f"rewards/{kind}"]) / number
        if len(found) == 3:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found


def _both(logits_LW: torch.Tensor, batch: Batch, groups: Groups, part: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What policy and reference say of the answers that count, fp32 [S] each."""
    assert batch.references_NQ is not None and batch.num_parts == 1
    samples_S = counting_samples(batch)
    policy_S = answer_logprobs(logits_LW, batch, groups)[samples_S.to(logits_LW.device)]
    return policy_S, batch.references_NQ[samples_S, part].to(logits_LW.device)


def build_kto(recipe: Recipe, architecture: Architecture, groups: Groups) -> MarkedAnswers:
    """The stage of a recipe."""
    knobs = recipe.preference
    (loss_type,) = loss_types(recipe)  # one, as the recipe's checks have seen
    options = KtoOptions(
        loss_type=loss_type,  # type: ignore[arg-type]
        beta=knobs.beta,
        desirable_weight=knobs.desirable_weight,
        undesirable_weight=knobs.undesirable_weight,
    )
    _, multiple = row_multiples(recipe)
    return MarkedAnswers(groups, options, ReferencePoint(groups, architecture.inputs.image_token_id, multiple))
