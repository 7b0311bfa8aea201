"""Supervised fine-tuning: next-token cross entropy on what the rows say to learn.

Shape suffixes: L tokens of this context-parallel rank, W this rank's part of the vocabulary, T the whole row.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from megavlm.config.schema import Recipe
from megavlm.config.stage_knobs import SftConfig
from megavlm.data.sample import Batch
from megavlm.losses.cross_entropy import cross_entropy, regularised_cross_entropy
from megavlm.losses.reductions import reduced_weights
from megavlm.models.architecture import Architecture
from megavlm.parallel.context import local_part
from megavlm.parallel.groups import Groups
from megavlm.train.stages.stage import Sums


@dataclass(frozen=True)
class SupervisedFineTuning:
    """The SFT stage.

    Attributes:
        groups: process groups.
        knobs: what the loss is.
        vocabulary_size: token ids of the model, for label smoothing.
    """

    groups: Groups
    knobs: SftConfig = SftConfig()
    vocabulary_size: int = 0
    look_ahead: ClassVar[None] = None

    @property
    def is_regularised(self) -> bool:
        """Whether the loss is more than the likelihood of the answers."""
        return self.knobs.label_smoothing_factor > 0 or self.knobs.z_loss_coeff > 0

    @property
    def metric_sizes(self) -> dict[str, int]:
        """The parts of a regularised loss."""
        return {"nll": 1, "z": 1} if self.is_regularised else {}

    def loss(self, logits_LW: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        """Sum over this rank's tokens, and the weight to divide by (once, over the global batch)."""
        context, knobs = self.groups.context, self.knobs
        weights_T = reduced_weights(batch.loss_weights_T, batch.cu_seqlens, knobs.loss_reduction)
        labels_L, weights_L = (
            local_part(tensor_T, batch.cu_seqlens, context.size(), context.rank()).to(logits_LW.device)
            for tensor_T in (batch.labels_T, weights_T)
        )
        if not self.is_regularised:
            return cross_entropy(logits_LW, labels_L, weights_L, self.groups.tensor)
        loss_sum, weight, metrics = regularised_cross_entropy(
            logits_LW,
            labels_L,
            weights_L,
            self.groups.tensor,
            self.vocabulary_size,
            knobs.label_smoothing_factor,
            knobs.z_loss_coeff,
        )
        return loss_sum, weight, {name: value[None] for name, value in metrics.items()}

    def figures(self, sums: Sums, count: float) -> dict[str, float]:
        """Means with the weights of the loss."""
        return {name: float(value) / count for name, value in sums.items()}


def build_sft(recipe: Recipe, architecture: Architecture, groups: Groups) -> SupervisedFineTuning:
    """The stage of a recipe."""
    return SupervisedFineTuning(groups, recipe.sft, architecture.language.vocab_size)
