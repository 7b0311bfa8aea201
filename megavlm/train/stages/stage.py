"""What a training method is to the loop, which knows none by name.

Shape suffixes: L tokens of this context-parallel rank, W this rank's part of the vocabulary (1 of a reward model).
"""

from collections.abc import Mapping
from typing import Protocol

import torch

from megavlm.data.sample import Batch

Sums = Mapping[str, torch.Tensor]
"""Vectors that are added up over microbatches and ranks."""


class LookAhead(Protocol):
    """A forward pass over the whole global batch before its step."""

    def read(self, batch: Batch) -> Batch:
        """What goes through it of a row."""

    def remaining(self, batch: Batch) -> Batch:
        """What is left of the row for the step."""

    def new_sums(self, num_samples: int, device: torch.device) -> torch.Tensor:
        """Zeros, for what is added up over microbatches and ranks of so many samples."""

    def add(self, sums: torch.Tensor, outputs_LW: torch.Tensor, batch: Batch) -> None:
        """Add what a microbatch on this rank has to `sums`; its samples are numbered from `batch.first_number` on."""

    def result(self, sums: torch.Tensor) -> torch.Tensor:
        """Of the sums over all: what the batches of the step carry as `ahead`. All ranks of the world call it."""


class Stage(Protocol):
    """A training method."""

    @property
    def metric_sizes(self) -> Mapping[str, int]:
        """Names and lengths of the vectors that `loss` gives beside the loss."""

    @property
    def look_ahead(self) -> LookAhead | None:
        """What the loss needs to know of the whole global batch, by the weights as they are; None: nothing."""

    def loss(self, outputs_LW: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        """(sum, count, further sums) of one microbatch on this rank.

        The gradient is that of the sum over ranks that have different tokens (data and context), divided by the count
        over them.
        """

    def figures(self, sums: Sums, count: float) -> dict[str, float]:
        """What the log says, from the sums (float64) and the count over all microbatches and ranks."""
