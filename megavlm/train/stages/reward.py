"""Reward models: a score for every answer, learned from pairs.

Shape suffixes: T tokens of the whole row, L of this context-parallel rank, Q sequences of the row (chosen and rejected
in turn), P pairs that count.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from megavlm.config.schema import Recipe
from megavlm.data.sample import Batch
from megavlm.losses.reward import calibration_sums, expected_calibration_error, reward_loss
from megavlm.models.architecture import Architecture
from megavlm.parallel.context import local_part
from megavlm.parallel.groups import Groups
from megavlm.train.stages.preference import REWARD_METRICS
from megavlm.train.stages.sequences import (
    counting_samples,
    last_wanted_tokens,
    predicts_answer,
    sequence_sums,
)
from megavlm.train.stages.stage import Sums

NUM_BINS = 10
"""Of confidence, for the calibration error."""


@dataclass(frozen=True)
class RewardModelling:
    """The `rm` stage.

    Attributes:
        groups: process groups.
        center_rewards_coefficient: weight of what keeps scores around 0.
        score_at: the token whose score is the answer's.
    """

    groups: Groups
    center_rewards_coefficient: float
    score_at: Literal["last_token", "end_of_answer"]
    look_ahead: ClassVar[None] = None
    census: ClassVar[None] = None
    split_gradients: ClassVar[None] = None
    memory: ClassVar[None] = None
    metric_sizes: ClassVar[dict[str, int]] = dict.fromkeys(REWARD_METRICS, 1) | {"calibration": 3 * NUM_BINS}

    def loss(self, scores_L1: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        """Sum over the pairs of the row, and how many there are; each context rank has its share of both."""
        context, device = self.groups.context, scores_L1.device
        pairs_P = counting_samples(batch)
        scores_Q = answer_scores(scores_L1, batch, self.groups, self.score_at)
        chosen_P, rejected_P = scores_Q.view(-1, 2)[pairs_P.to(device)].unbind(1)
        margin_P = batch.targets_N[pairs_P].to(device)
        loss_sum, count, metrics = reward_loss(chosen_P, rejected_P, margin_P, self.center_rewards_coefficient)
        sums = {name: value[None] / context.size() for name, value in metrics.items()}
        sums["calibration"] = calibration_sums(chosen_P, rejected_P, NUM_BINS).flatten() / context.size()
        return loss_sum / context.size(), count / context.size(), sums

    def count(self, batch: Batch) -> float:
        """As `Stage` says."""
        return float(len(counting_samples(batch)))

    def figures(self, sums: Sums, count: float) -> dict[str, float]:
        """Means over pairs, and how far confidence is from accuracy."""
        means = {name: float(sums[name]) / count for name in REWARD_METRICS}
        error = expected_calibration_error(sums["calibration"].view(NUM_BINS, 3))
        return means | {"calibration_error": float(error)}


def answer_scores(scores_L1: torch.Tensor, batch: Batch, groups: Groups, score_at: str) -> torch.Tensor:
    """The score of each sequence of a row, fp32 [Q].

    Args:
        scores_L1: of this rank's tokens.
        batch: the row.
        groups: process groups.
        score_at: `last_token` of the sequence, or `end_of_answer`, the last token that is learned of it.
    """
    context = groups.context
    chosen_T = torch.zeros(len(batch.tokens_T))
    chosen_T[scored_tokens(batch, score_at)] = 1.0
    chosen_L = local_part(chosen_T, batch.cu_seqlens, context.size(), context.rank()).to(scores_L1.device)
    return sequence_sums(scores_L1[:, 0].float() * chosen_L, batch, groups)


def scored_tokens(batch: Batch, score_at: str) -> torch.Tensor:
    """Position in the packed row of the token that speaks for each sequence: int64 [Q].

    Chat templates may print something behind the end of an answer, e.g. a line break: `last_token` is that, as in
    transformers' sequence classification.
    """
    wanted_T = batch.real_T
    if score_at == "end_of_answer":
        wanted_T = torch.cat((wanted_T.new_zeros(1), predicts_answer(batch)[:-1]))
    return last_wanted_tokens(wanted_T, batch)


def build_rm(recipe: Recipe, architecture: Architecture, groups: Groups) -> RewardModelling:
    """The stage of a recipe."""
    return RewardModelling(groups, recipe.reward.center_rewards_coefficient, recipe.reward.score_at)
