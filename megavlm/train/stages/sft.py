"""Supervised fine-tuning: next-token cross entropy on what the rows say to learn.

Shape suffixes: L tokens of this context-parallel rank, W this rank's part of the vocabulary, T the whole row.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from megavlm.config.schema import Recipe
from megavlm.data.sample import Batch
from megavlm.losses.cross_entropy import cross_entropy
from megavlm.parallel.context import local_part
from megavlm.parallel.groups import Groups
from megavlm.train.stages.stage import Sums


@dataclass(frozen=True)
class SupervisedFineTuning:
    """The SFT stage."""

    groups: Groups
    metric_sizes: ClassVar[dict[str, int]] = {}

    def loss(self, logits_LW: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        """Sum over this rank's tokens, and the weight to divide by (once, over the global batch)."""
        context = self.groups.context
        labels_L, weights_L = (
            local_part(tensor_T, batch.cu_seqlens, context.size(), context.rank()).to(logits_LW.device)
            for tensor_T in (batch.labels_T, batch.loss_weights_T)
        )
        return cross_entropy(logits_LW, labels_L, weights_L, self.groups.tensor)

    def figures(self, sums: Sums, count: float) -> dict[str, float]:
        """Nothing beside the loss."""
        return {}


def build_sft(recipe: Recipe, groups: Groups) -> SupervisedFineTuning:
    """The stage of a recipe."""
    return SupervisedFineTuning(groups)
