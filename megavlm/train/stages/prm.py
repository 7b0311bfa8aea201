"""Process reward models: a score for every step of an answer, learned from steps that are marked right or wrong.

Shape suffixes: T tokens of the whole row, L of this context-parallel rank.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from megavlm.config.schema import Recipe
from megavlm.data.sample import Batch
from megavlm.losses.process_reward import process_reward_loss
from megavlm.models.architecture import Architecture
from megavlm.parallel.context import local_part
from megavlm.parallel.groups import Groups
from megavlm.train.stages.stage import Sums


@dataclass(frozen=True)
class ProcessRewardModelling:
    """The `prm` stage."""

    groups: Groups
    look_ahead: ClassVar[None] = None
    census: ClassVar[None] = None
    split_gradients: ClassVar[None] = None
    memory: ClassVar[None] = None
    metric_sizes: ClassVar[dict[str, int]] = dict.fromkeys(
        ("count/right", "count/wrong", "agrees/right", "agrees/wrong"), 1
    )

    def loss(self, scores_L1: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        """Sum over the steps that this rank has the last tokens of, and the weight to divide by."""
        context = self.groups.context
        marks_L = local_part(step_marks(batch), batch.cu_seqlens, context.size(), context.rank())
        loss_sum, weight, metrics = process_reward_loss(scores_L1[:, 0], marks_L.to(scores_L1.device))
        return loss_sum, weight, {name: value[None] for name, value in metrics.items()}

    def count(self, batch: Batch) -> float:
        """As `Stage` says."""
        return float(step_marks(batch).abs().sum())

    def figures(self, sums: Sums, count: float) -> dict[str, float]:
        """Of how many steps the score is on the right side of 0: of all, of the right ones and of the wrong ones."""
        number = {name: float(sums[f"count/{name}"]) for name in ("right", "wrong")}
        agrees = {name: float(sums[f"agrees/{name}"]) for name in number}
        found = {f"accuracy/{name}": agrees[name] / number[name] for name in number if number[name]}
        return found | {"accuracy": sum(agrees.values()) / sum(number.values())}


def step_marks(batch: Batch) -> torch.Tensor:
    """At the last token of each step its weight, negative where the step is wrong: fp32 [T]."""
    weights_T = batch.loss_weights_T  # of predicting the token behind
    return torch.cat((weights_T.new_zeros(1), weights_T[:-1]))


def build_prm(recipe: Recipe, architecture: Architecture, groups: Groups) -> ProcessRewardModelling:
    """The stage of a recipe."""
    return ProcessRewardModelling(groups)
