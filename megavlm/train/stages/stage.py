"""What a training method is to the loop, which knows none by name.

Shape suffixes: T tokens of a row, L of this context-parallel rank, W this rank's part of the vocabulary (1 of a reward
model).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from megavlm.data.dataset import Dataset
from megavlm.data.sample import Batch

Sums = Mapping[str, torch.Tensor]
"""Vectors that are added up over microbatches and ranks."""


class LookAhead(Protocol):
    """A forward pass over the whole global batch before its step."""

    def read(self, batch: Batch) -> Batch:
        """What goes through it of a row."""

    def remaining(self, batch: Batch, ahead: torch.Tensor, rows: Dataset) -> Batch:
        """What the row is in the step: `ahead` is of `result`, and `rows` are those that the batch is of."""

    def new_sums(self, num_samples: int, device: torch.device) -> torch.Tensor:
        """Zeros, for what is added up over microbatches and ranks of so many samples."""

    def add(self, sums: torch.Tensor, outputs_LW: torch.Tensor, batch: Batch) -> None:
        """Add what a microbatch on this rank has to `sums`; its samples are numbered from `batch.first_number` on."""

    def result(self, sums: torch.Tensor) -> torch.Tensor:
        """Of the sums over all: what the batches of the step carry as `ahead`. All ranks of the world call it."""


class Census(Protocol):
    """What the rows of a global batch say before its step, without the model."""

    def sums(self, batch: Batch) -> torch.Tensor:
        """Of a packed row, whole: a float64 vector of `num_sums`, added up over microbatches and data ranks."""

    def result(self, sums: torch.Tensor, training: bool) -> torch.Tensor:
        """Of the sums over all: what the batches of the step, or of an evaluation, carry as `ahead`."""

    @property
    def num_sums(self) -> int:
        """Length of the vector."""


class SplitGradients(Protocol):
    """Parts of a loss whose gradients by the last shared layer are wanted apart; each token belongs to one."""

    def parts_of(self, batch: Batch) -> torch.Tensor:
        """Number of the part of each token of a row, whole: int64 [T]."""

    @property
    def num_parts(self) -> int:
        """How many there are."""


class Memory(Protocol):
    """What a stage learns from step to step beside the weights of the model; the same on every rank."""

    def take(self, sums: Sums, count: float) -> None:
        """Take in a step that has changed the weights: the stage's sums and the count over all.

        Of a stage with `split_gradients`, `gradient_norms` is among the sums: of each part's share of the mean loss.
        """

    def state(self) -> dict[str, Any]:
        """For checkpoints: plain values."""

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Go on from the checkpoint in `folder`; from one without a state (empty), from the start.

        Raises:
            UseError: the state is of something else.
        """


class Stage(Protocol):
    """A training method."""

    @property
    def metric_sizes(self) -> Mapping[str, int]:
        """Names and lengths of the vectors that `loss` gives beside the loss."""

    @property
    def look_ahead(self) -> LookAhead | None:
        """What the loss needs to know of the whole global batch, by the weights as they are; None: nothing."""

    @property
    def census(self) -> Census | None:
        """What the loss needs to know of the whole global batch, by its rows; None: nothing. Never with look_ahead."""

    @property
    def split_gradients(self) -> SplitGradients | None:
        """What `memory` wants to know of gradients; None: nothing."""

    @property
    def memory(self) -> Memory | None:
        """What goes on from step to step; None: nothing."""

    def loss(self, outputs_LW: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        """(sum, count, further sums) of one microbatch on this rank.

        The gradient is that of the sum over ranks that have different tokens (data and context), divided by the count
        over them.
        """

    def count(self, batch: Batch) -> float:
        """What the counts of `loss` for a row add up to over context ranks, as far as the row itself says it."""

    def figures(self, sums: Sums, count: float) -> dict[str, float]:
        """What the log says, from the sums (float64) and the count over all microbatches and ranks."""
