"""What a training method is to the loop, which knows none by name.

Shape suffixes: L tokens of this context-parallel rank, W this rank's part of the vocabulary (1 of a reward model).
"""

from collections.abc import Mapping
from typing import Protocol

import torch

from megavlm.data.sample import Batch

Sums = Mapping[str, torch.Tensor]
"""Vectors that are added up over microbatches and ranks."""


class Stage(Protocol):
    """A training method."""

    @property
    def metric_sizes(self) -> Mapping[str, int]:
        """Names and lengths of the vectors that `loss` gives beside the loss."""

    def loss(self, outputs_LW: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        """(sum, count, further sums) of one microbatch on this rank.

        The gradient is that of the sum over ranks that have different tokens (data and context), divided by the count
        over them.
        """

    def figures(self, sums: Sums, count: float) -> dict[str, float]:
        """What the log says, from the sums (float64) and the count over all microbatches and ranks."""
