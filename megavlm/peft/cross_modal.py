"""Bottleneck adapters of the language model in which words and images meet in one narrow space.

    y + up_m(silu(shared(silu(down_m(y)))))     y: what attention or MLP gives; m: whether the token is visual or a word

Each kind of token has projections down and up of its own; the one between them is shared, so it learns from both.
The two `up` begin at 0, so that the model is what it was.

Source: after Yang et al. (MMA: Multi-Modal Adapter), CVPR 2024, for two encoders; here both kinds of tokens are in one
decoder, whose attention mixes them. Sharing weights between modalities: Jiang et al., arXiv 2211.09623.

Shape suffixes: S tokens of this rank's sequence part, B is 1, H hidden size, Z inner width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megavlm.models.visual_tokens import VisualTokens
from megavlm.peft.targets import seed_of

KINDS = ("image", "text")


class CrossModalBottleneck(nn.Module):
    """The two narrow MLPs, with biases; every one of their weights has a gradient, also of a row without images."""

    def __init__(self, hidden_size: int, size: int, dtype: torch.dtype, visual_tokens: VisualTokens) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": dtype, "device": torch.cuda.current_device()}
        self.down = nn.ModuleDict({kind: nn.Linear(hidden_size, size, **options) for kind in KINDS})
        self.shared = nn.Linear(size, size, **options)
        self.up = nn.ModuleDict({kind: nn.Linear(size, hidden_size, **options) for kind in KINDS})
        self._visual_tokens = visual_tokens

    def forward(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """What is added."""
        is_visual_S11 = self._visual_tokens.is_visual_S11.to(hidden_SBH.device)
        image_SBZ, text_SBZ = (self.down[kind](hidden_SBH) for kind in KINDS)
        inner_SBZ = F.silu(self.shared(F.silu(torch.where(is_visual_S11, image_SBZ, text_SBZ))))
        image_SBH, text_SBH = (self.up[kind](inner_SBZ) for kind in KINDS)
        return torch.where(is_visual_S11, image_SBH, text_SBH)

    @torch.no_grad()
    def initialise(self, name: str, seed: int) -> None:
        """Draw what is not `up` uniformly as nn.Linear does, from numbers that do not depend on the layout."""
        for parameter in self.parameters():
            parameter.zero_()
        drawn: dict[str, Any] = {**{f"down.{kind}": self.down[kind] for kind in KINDS}, "shared": self.shared}
        for part, linear in drawn.items():
            generator = torch.Generator().manual_seed(seed_of(seed, f"{name}.{part}"))
            values = torch.rand(linear.weight.shape, generator=generator, device="cpu") * 2 - 1
            linear.weight.copy_(values / math.sqrt(linear.in_features))
