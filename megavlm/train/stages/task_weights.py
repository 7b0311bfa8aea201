"""Weights of tasks that change from step to step, and what they go on from in a checkpoint.

Everything here is float64 on the CPU, computed from sums over the whole global batch: the same on every rank and under
every layout, but for the order of those sums.

Shape suffixes: K tasks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megavlm.config.schema import Recipe
from megavlm.config.stage_knobs import SftConfig
from megavlm.config.tasks import task_names
from megavlm.errors import use_error
from megavlm.losses.tasks import gradient_norm_objective, ratio_weights, rescaled, uncertainty_objective
from megavlm.train.stages.stage import Sums

LEAST_WEIGHT = 1e-3
"""GradNorm's weights are kept above this: Adam could take them through 0, which no norm would bring them back from."""


@dataclass(frozen=True)
class TaskFigures:
    """What a step has shown of the tasks, over the whole global batch; float64 [K] each.

    Attributes:
        losses_K: means over each task's tokens, without weights of tasks; 0 where it had none.
        shares_K: what these tokens weigh, over what all do.
        gradient_norms_K: by the last shared layer, of each task's share of the mean loss, with the weight it had; None
            where nobody asks for them.
    """

    losses_K: torch.Tensor
    shares_K: torch.Tensor
    gradient_norms_K: torch.Tensor | None = None

    @property
    def present_K(self) -> torch.Tensor:
        """Whether the step had anything of a task."""
        return self.shares_K > 0


class Weighting(Protocol):
    """A way to weigh tasks."""

    def factors(self) -> torch.Tensor:
        """Of the losses of each task's tokens in the next step."""

    def offsets(self) -> torch.Tensor:
        """What is added to the loss of each task's tokens in the next step."""

    def take(self, figures: TaskFigures) -> None:
        """Take in a step."""

    def state(self) -> dict[str, Any]:
        """For checkpoints: lists of numbers."""

    def restore(self, state: dict[str, Any]) -> None:
        """Back to a state."""


class FixedWeights:
    """`fixed`: factors that the recipe names."""

    def __init__(self, names: Sequence[str], knobs: SftConfig) -> None:
        """1 for tasks that it does not name."""
        named = {entry.name: entry.weight for entry in knobs.task_weights}
        self._factors = torch.tensor([named.get(name, 1.0) for name in names], dtype=torch.float64)

    def factors(self) -> torch.Tensor:
        """See `Weighting`."""
        return self._factors

    def offsets(self) -> torch.Tensor:
        """None."""
        return torch.zeros_like(self._factors)

    def take(self, figures: TaskFigures) -> None:
        """Nothing changes."""

    def state(self) -> dict[str, Any]:
        """There is none: a recipe that goes on may name other factors."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing."""


class LossRatio:
    """`loss_ratio`: by how much of its first loss a task still has (see `ratio_weights`).

    A task counts as one that has learned nothing until it has been seen.
    """

    def __init__(self, names: Sequence[str], knobs: SftConfig) -> None:
        """All alike."""
        self._momentum, self._temperature = knobs.task_weight_momentum, knobs.task_weight_temperature
        self._initial_K = torch.zeros(len(names), dtype=torch.float64)
        self._running_K = torch.zeros_like(self._initial_K)

    def factors(self) -> torch.Tensor:
        """See `Weighting`."""
        seen_K = self._initial_K > 0
        running_K, initial_K = torch.where(seen_K, self._running_K, 1), torch.where(seen_K, self._initial_K, 1)
        return ratio_weights(running_K, initial_K, self._temperature)

    def offsets(self) -> torch.Tensor:
        """None."""
        return torch.zeros_like(self._initial_K)

    def take(self, figures: TaskFigures) -> None:
        """The losses of tasks that the step had something of go into the running ones."""
        is_first_K = figures.present_K & (self._initial_K == 0)
        self._initial_K = torch.where(is_first_K, figures.losses_K, self._initial_K)
        blended_K = self._momentum * self._running_K + (1 - self._momentum) * figures.losses_K
        running_K = torch.where(is_first_K, figures.losses_K, blended_K)
        self._running_K = torch.where(figures.present_K, running_K, self._running_K)

    def state(self) -> dict[str, Any]:
        """First and running losses."""
        return {"initial": self._initial_K.tolist(), "running": self._running_K.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        """See `Weighting`."""
        self._initial_K = torch.tensor(state["initial"], dtype=torch.float64)
        self._running_K = torch.tensor(state["running"], dtype=torch.float64)


class _Learned:
    """Numbers that Adam learns beside the model, with its state."""

    def __init__(self, values_K: torch.Tensor, lr: float) -> None:
        self.values_K = torch.nn.Parameter(values_K)
        self._adam = torch.optim.Adam([self.values_K], lr=lr)

    def step(self, objective: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """One step down an objective of the values."""
        self._adam.zero_grad()
        objective(self.values_K).backward()
        self._adam.step()

    def state(self) -> dict[str, Any]:
        moments = self._adam.state[self.values_K]
        return {"values": self.values_K.tolist()} | {
            name: torch.as_tensor(value, dtype=torch.float64).tolist() for name, value in moments.items()
        }

    def restore(self, state: dict[str, Any]) -> None:
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()}
        with torch.no_grad():
            self.values_K.copy_(tensors.pop("values"))
        self._adam.state[self.values_K] = tensors


class Uncertainty:
    """`uncertainty`: the logarithm of each task's variance is learned (see `uncertainty_objective`)."""

    def __init__(self, names: Sequence[str], knobs: SftConfig) -> None:
        """All variances are 1."""
        self._log_variances = _Learned(torch.zeros(len(names), dtype=torch.float64), knobs.task_weight_lr)

    def factors(self) -> torch.Tensor:
        """See `Weighting`."""
        return torch.exp(-self._log_variances.values_K.detach())

    def offsets(self) -> torch.Tensor:
        """See `Weighting`."""
        return self._log_variances.values_K.detach() / 2

    def take(self, figures: TaskFigures) -> None:
        """One step of Adam; the losses are those that the step's weights were learned by."""
        self._log_variances.step(lambda s_K: uncertainty_objective(figures.losses_K, figures.shares_K, s_K))

    def state(self) -> dict[str, Any]:
        """Variances and Adam's moments."""
        return self._log_variances.state()

    def restore(self, state: dict[str, Any]) -> None:
        """See `Weighting`."""
        self._log_variances.restore(state)


class GradNorm:
    """`gradnorm`: norms of gradients follow rates of training (see `gradient_norm_objective`).

    A task that a step had nothing of has no part in its means and no gradient; the mean of all weights stays 1.
    """

    def __init__(self, names: Sequence[str], knobs: SftConfig) -> None:
        """All alike."""
        self._alpha = knobs.task_weight_alpha
        self._weights = _Learned(torch.ones(len(names), dtype=torch.float64), knobs.task_weight_lr)
        self._initial_K = torch.zeros(len(names), dtype=torch.float64)

    def factors(self) -> torch.Tensor:
        """See `Weighting`."""
        return self._weights.values_K.detach().clone()

    def offsets(self) -> torch.Tensor:
        """None."""
        return torch.zeros_like(self._initial_K)

    def take(self, figures: TaskFigures) -> None:
        """Algorithm 1 of the paper, behind the step of the model's weights."""
        assert figures.gradient_norms_K is not None
        present_K = figures.present_K
        self._initial_K = torch.where(present_K & (self._initial_K == 0), figures.losses_K, self._initial_K)
        norms_K = figures.gradient_norms_K / self.factors()
        progress_K = figures.losses_K / torch.where(self._initial_K > 0, self._initial_K, 1)
        self._weights.step(
            lambda weights_K: gradient_norm_objective(
                weights_K[present_K], norms_K[present_K], progress_K[present_K], self._alpha
            )
        )
        with torch.no_grad():
            values_K = self._weights.values_K
            values_K.copy_(rescaled(values_K.clamp(min=LEAST_WEIGHT)))

    def state(self) -> dict[str, Any]:
        """Weights, Adam's moments, first losses."""
        return {"initial": self._initial_K.tolist(), "weights": self._weights.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """See `Weighting`."""
        self._initial_K = torch.tensor(state["initial"], dtype=torch.float64)
        self._weights.restore(state["weights"])


WEIGHTINGS: dict[str, Callable[[Sequence[str], SftConfig], Weighting]] = {
    "none": FixedWeights,
    "fixed": FixedWeights,
    "uncertainty": Uncertainty,
    "gradnorm": GradNorm,
    "loss_ratio": LossRatio,
}


@dataclass(frozen=True)
class TaskWeights:
    """The tasks of a run and how they are weighed; the memory of the sft stage.

    Attributes:
        names: of the tasks; empty: they are not told apart.
        way: sft.task_weighting.
        weighting: made for it.
    """

    names: tuple[str, ...]
    way: str
    weighting: Weighting

    def figures_of(self, sums: Sums, count: float) -> TaskFigures:
        """Out of sums over the global batch.

        Args:
            sums: `tasks`, losses and weights of each task's tokens, and where they are known `gradient_norms`.
            count: weights of all tokens.
        """
        losses_K, weights_K = sums["tasks"].cpu().view(2, -1)
        means_K = losses_K / torch.where(weights_K > 0, weights_K, 1)
        norms_K = sums["gradient_norms"].cpu() if "gradient_norms" in sums else None
        return TaskFigures(means_K, weights_K / count, norms_K)

    def take(self, sums: Sums, count: float) -> None:
        """See `Memory`."""
        if self.names:
            self.weighting.take(self.figures_of(sums, count))

    def log(self, figures: TaskFigures) -> dict[str, float]:
        """Losses of the tasks that were there, the weights that they have, and norms of their gradients."""
        found = {}
        present, losses, factors = figures.present_K.tolist(), figures.losses_K.tolist(), self.weighting.factors()
        for number, (name, weight) in enumerate(zip(self.names, factors.tolist(), strict=True)):
            if present[number]:
                found[f"task/{name}/loss"] = losses[number]
            found[f"task/{name}/weight"] = weight
            if figures.gradient_norms_K is not None:
                found[f"task/{name}/grad_norm"] = float(figures.gradient_norms_K[number])
        return found

    def state(self) -> dict[str, Any]:
        """For checkpoints; empty where nothing is learned."""
        inner = self.weighting.state()
        return {"way": self.way, "names": list(self.names), "weighting": inner} if inner else {}

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """See `Memory`.

        Raises:
            UseError: the checkpoint weighed other tasks, or in another way.
        """
        ours = {"way": self.way, "names": list(self.names)} if self.weighting.state() else {}
        theirs = {name: value for name, value in state.items() if name != "weighting"}
        if ours != theirs:
            raise use_error(
                "sft.task_weighting",
                _described(ours),
                f"{_described(theirs)}, as {folder} was written",
                "keep it when resuming; to change it, start a new run from exported weights",
            )
        if state:
            self.weighting.restore(state["weighting"])


NO_TASKS = TaskWeights((), "none", FixedWeights((), SftConfig()))


def _described(state: dict[str, Any]) -> str:
    return f"{state['way']} of {', '.join(state['names'])}" if state else "weights that are not learned"


def build_task_weights(recipe: Recipe) -> TaskWeights:
    """What a recipe says of tasks."""
    names, way = task_names(recipe), recipe.sft.task_weighting
    return TaskWeights(names, way, WEIGHTINGS[way](names, recipe.sft))
