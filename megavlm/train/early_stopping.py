"""When to stop before the last step: the loss on held-out rows has not fallen for some evaluations."""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class EarlyStopping:
    """What the evaluations so far have come to; the same on every rank, and in checkpoints.

    Attributes:
        patience: evaluations in a row without a lower loss, after which to stop; 0: never.
        threshold: by how much a loss has to be lower than the lowest before.
        lowest: loss so far.
        num_worse: evaluations since.
    """

    patience: int
    threshold: float = 0.0
    lowest: float = math.inf
    num_worse: int = 0

    def take(self, loss: float) -> None:
        """Count an evaluation."""
        if loss < self.lowest - self.threshold:
            self.lowest, self.num_worse = loss, 0
        else:
            self.num_worse += 1

    @property
    def stops(self) -> bool:
        """Whether patience has run out."""
        return 0 < self.patience <= self.num_worse

    def state(self) -> dict[str, Any]:
        """For checkpoints."""
        return {name: value for name, value in asdict(self).items() if name in ("lowest", "num_worse")}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; from one that knows nothing of it, from the start."""
        self.lowest, self.num_worse = state.get("lowest", math.inf), state.get("num_worse", 0)
