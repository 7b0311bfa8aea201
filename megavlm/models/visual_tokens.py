"""Which tokens of a row are visual, for layers that treat them otherwise than words."""

import torch


class VisualTokens:
    """Of the row that a chunk of the language model runs, forward or backward.

    Layers cannot be handed it: what is recomputed of a layer in the backward pass is handed its own inputs alone. So
    whoever runs a chunk says in front of both passes which row it is.
    """

    def __init__(self) -> None:
        self._is_visual_S: torch.Tensor | None = None

    def show(self, is_visual_S: torch.Tensor) -> None:
        """Go on with another row: bool, of the tokens that this rank's layers see."""
        self._is_visual_S = is_visual_S

    @property
    def is_visual_S11(self) -> torch.Tensor:
        """Bool [S, 1, 1]."""
        assert self._is_visual_S is not None, "a layer runs before its row is known"
        return self._is_visual_S[:, None, None]
