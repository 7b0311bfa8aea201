"""Supervised fine-tuning: next-token cross entropy on what the rows say to learn.

Beside it, if the recipe says so: weights of tasks (`task_weights.py`), a loss of whole boxes (`boxes.py`), and one of
masks (`masks.py`).

Shape suffixes: L tokens of this context-parallel rank, W this rank's part of the vocabulary, T the whole row, K tasks.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from megavlm.config.schema import Recipe
from megavlm.config.stage_knobs import SftConfig
from megavlm.data.sample import Batch
from megavlm.losses.chunked import Logits
from megavlm.losses.cross_entropy import cross_entropy, regularised_cross_entropy, regularised_token_losses
from megavlm.losses.logprob import token_logprobs
from megavlm.losses.masks import LogitsAndMasks, words_of
from megavlm.losses.reductions import reduced_weights
from megavlm.losses.sequences import samples_of_tokens
from megavlm.losses.tasks import task_sums
from megavlm.models.architecture import Architecture
from megavlm.parallel.context import local_part
from megavlm.parallel.groups import Groups
from megavlm.train.stages.boxes import BoxObjective, build_boxes
from megavlm.train.stages.masks import MASK_FIGURES, MaskObjective, build_masks
from megavlm.train.stages.stage import Sums
from megavlm.train.stages.task_weights import NO_TASKS, TaskWeights, build_task_weights


@dataclass(frozen=True)
class RowsAhead:
    """What the rows of a global batch say before its step: how the parts of the loss are weighed against each other.

    Everything is divided by the weight of all tokens in the end, so what is to be a mean over boxes, or over masks, is
    multiplied by it before. Held-out rows are judged without weights of tasks, so that their losses compare.

    Attributes:
        knobs: what the loss is.
        tasks: of the run.
        boxes: their loss; None: there is none.
        masks: theirs.
    """

    knobs: SftConfig
    tasks: TaskWeights
    boxes: BoxObjective | None
    masks: MaskObjective | None
    num_sums: ClassVar[int] = 3

    def sums(self, batch: Batch) -> torch.Tensor:
        """[weight of the tokens, boxes, masks]."""
        weights_T = reduced_weights(batch.loss_weights_T, batch.cu_seqlens, self.knobs.loss_reduction)
        counts = [0 if part is None else part.count(batch) for part in (self.boxes, self.masks)]
        return torch.cat((weights_T.double().sum()[None], torch.tensor(counts, dtype=torch.float64)))

    def result(self, sums: torch.Tensor, training: bool) -> torch.Tensor:
        """[factors of boxes, masks, tasks and of no task, what is added to losses of tasks]: float64 [4 + 2 K]."""
        weight, *numbers = sums.tolist()
        of_parts = [
            part.coefficient * weight / number if part is not None and number else 0.0
            for part, number in zip((self.boxes, self.masks), numbers, strict=True)
        ]
        factors_K, offsets_K = self.tasks.weighting.factors(), self.tasks.weighting.offsets()
        if not training:
            factors_K, offsets_K = torch.ones_like(factors_K), torch.zeros_like(offsets_K)
        one, nothing = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        return torch.cat((torch.tensor(of_parts, dtype=torch.float64), factors_K, one, offsets_K, nothing))


@dataclass(frozen=True)
class GradientsByTask:
    """Gradients of tasks apart, for GradNorm."""

    num_parts: int

    def parts_of(self, batch: Batch) -> torch.Tensor:
        """See `SplitGradients`."""
        return tasks_of_tokens(batch)


@dataclass(frozen=True)
class SupervisedFineTuning:
    """The SFT stage.

    Attributes:
        groups: process groups.
        knobs: what the loss is.
        vocabulary_size: token ids of the model, for label smoothing.
        memory: the tasks, with their weights.
        boxes: the loss of whole boxes; None: there is none.
        masks: the loss of masks; None: there is none.
    """

    groups: Groups
    knobs: SftConfig = SftConfig()
    vocabulary_size: int = 0
    memory: TaskWeights = NO_TASKS
    boxes: BoxObjective | None = None
    masks: MaskObjective | None = None
    look_ahead: ClassVar[None] = None

    @property
    def is_regularised(self) -> bool:
        """Whether the loss of a token is more than its likelihood."""
        return self.knobs.label_smoothing_factor > 0 or self.knobs.z_loss_coeff > 0

    @property
    def has_tasks(self) -> bool:
        """Whether tasks are told apart."""
        return bool(self.memory.names)

    @property
    def census(self) -> RowsAhead | None:
        """For weights of tasks, for boxes and for masks."""
        if not self.has_tasks and self.boxes is None and self.masks is None:
            return None
        return RowsAhead(self.knobs, self.memory, self.boxes, self.masks)

    @property
    def split_gradients(self) -> GradientsByTask | None:
        """For GradNorm."""
        return GradientsByTask(len(self.memory.names)) if self.knobs.task_weighting == "gradnorm" else None

    @property
    def metric_sizes(self) -> dict[str, int]:
        """The parts of a regularised loss, of tasks, of boxes, of masks."""
        sizes = {"nll": 1, "z": 1} if self.is_regularised else {}
        if self.has_tasks:
            sizes["tasks"] = 2 * len(self.memory.names)
        sizes |= {} if self.boxes is None else {"boxes": 3}
        return sizes if self.masks is None else sizes | {"masks": len(MASK_FIGURES) + 1}

    def loss(self, outputs: Logits | LogitsAndMasks, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        """Sum over this rank's tokens, and the weight to divide by (once, over the global batch)."""
        logits_LW = words_of(outputs)
        labels_L, weights_L = self._local(batch, logits_LW.device)
        if self.has_tasks:
            loss_sum, weight, metrics = self._by_tasks(logits_LW, labels_L, weights_L, batch)
        elif self.is_regularised:
            loss_sum, weight, parts = regularised_cross_entropy(
                logits_LW, labels_L, weights_L, self.groups.tensor, self.vocabulary_size, *self._regularisation
            )
            metrics = {name: value[None] for name, value in parts.items()}
        else:
            loss_sum, weight, metrics = cross_entropy(logits_LW, labels_L, weights_L, self.groups.tensor)
        if self.boxes is not None:
            assert batch.ahead is not None
            box_sum, metrics["boxes"] = self.boxes.sums(logits_LW, batch)
            loss_sum = loss_sum + batch.ahead[0].to(box_sum) * box_sum
        if self.masks is not None:
            assert batch.ahead is not None and isinstance(outputs, LogitsAndMasks)
            mask_sum, metrics["masks"] = self.masks.sums(outputs, batch)
            loss_sum = loss_sum + batch.ahead[1].to(mask_sum) * mask_sum
        return loss_sum, weight, metrics

    @property
    def _regularisation(self) -> tuple[float, float]:
        return self.knobs.label_smoothing_factor, self.knobs.z_loss_coeff

    def _local(self, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels and weights of this rank's tokens."""
        weights_T = reduced_weights(batch.loss_weights_T, batch.cu_seqlens, self.knobs.loss_reduction)
        return self._part(batch.labels_T, batch, device), self._part(weights_T, batch, device)

    def _part(self, tensor_T: torch.Tensor, batch: Batch, device: torch.device) -> torch.Tensor:
        context = self.groups.context
        return local_part(tensor_T, batch.cu_seqlens, context.size(), context.rank()).to(device)

    def _by_tasks(
        self, logits_LW: Logits, labels_L: torch.Tensor, weights_L: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """The same with the loss of each token multiplied by its task's factor, and its task's offset added."""
        metrics: dict[str, torch.Tensor] = {}
        if self.is_regularised:
            losses_L, nll_L, squares_L = regularised_token_losses(
                logits_LW, labels_L, self.groups.tensor, self.vocabulary_size, *self._regularisation
            )
            parts = {"nll": nll_L, "z": squares_L}
            metrics = {name: (part_L * weights_L).detach().sum()[None] for name, part_L in parts.items()}
        else:
            losses_L = -token_logprobs(logits_LW, labels_L, self.groups.tensor)
        num_tasks = len(self.memory.names)
        tasks_L = self._part(tasks_of_tokens(batch), batch, losses_L.device)
        assert batch.ahead is not None
        factors, offsets = batch.ahead[2:].to(losses_L).split(num_tasks + 1)
        weighted_L = losses_L.detach() * weights_L
        sums = [task_sums(values_L, tasks_L, num_tasks + 1)[:num_tasks] for values_L in (weighted_L, weights_L)]
        metrics["tasks"] = torch.cat(sums)
        loss_sum = ((factors[tasks_L] * losses_L + offsets[tasks_L]) * weights_L).sum()
        return loss_sum, weights_L.sum(), metrics

    def count(self, batch: Batch) -> float:
        """As `Stage` says."""
        return float(reduced_weights(batch.loss_weights_T, batch.cu_seqlens, self.knobs.loss_reduction).sum())

    def figures(self, sums: Sums, count: float) -> dict[str, float]:
        """Means with the weights of the loss; of tasks over their own tokens, of boxes and masks over these."""
        found = {name: float(sums[name]) / count for name in ("nll", "z") if name in sums}
        if self.has_tasks:
            found |= self.memory.log(self.memory.figures_of(sums, count))
        if self.boxes is not None:
            l1, giou, number = sums["boxes"].tolist()
            found["box/count"] = round(number)
            if round(number):
                found |= {"box/l1": l1 / number, "box/giou": giou / number}
        if self.masks is not None:
            *parts, number = sums["masks"].tolist()
            found["mask/count"] = round(number)
            if round(number):
                found |= {name: part / number for name, part in zip(MASK_FIGURES, parts, strict=True)}
        return found


def tasks_of_tokens(batch: Batch) -> torch.Tensor:
    """Number of each token's task, int64 [T]; of tokens that weigh nothing it may be any."""
    assert batch.tasks_N is not None and batch.num_parts == 1
    samples_T = samples_of_tokens(batch.cu_seqlens)
    # behind the samples there may be segments of padding
    return batch.tasks_N[samples_T.clamp(max=len(batch.tasks_N) - 1)]


def build_sft(recipe: Recipe, architecture: Architecture, groups: Groups) -> SupervisedFineTuning:
    """The stage of a recipe."""
    return SupervisedFineTuning(
        groups,
        recipe.sft,
        architecture.language.vocab_size,
        build_task_weights(recipe),
        build_boxes(recipe, groups),
        build_masks(recipe, architecture, groups),
    )
