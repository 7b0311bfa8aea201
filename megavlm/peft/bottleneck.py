"""Bottleneck adapters: a narrow MLP with a residual, behind attention and MLP of a layer, or beside them.

    sequential:  y + up(silu(down(y)))     y: what the block gives, before it is added to the residual
    parallel:    y + up(silu(down(x)))     x: what the block takes

`up` begins at 0, so that the model is what it was. Every tensor-parallel rank has the whole adapter. Under sequence
parallelism it sees a part of the tokens, and its gradient is summed with those of the norms; else it computes on every
rank what it computes on the others.

Source: Houlsby et al. (arXiv 1902.00751), section 2.1; He et al. (arXiv 2110.04366), section 4.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from megavlm.models.linear import AdaptableLinear, LinearAdapter, Output
from megavlm.models.norm import mark_sequence_parallel
from megavlm.peft.targets import seed_of


class Bottleneck(nn.Module):
    """The narrow MLP, with biases."""

    def __init__(self, num_inputs: int, size: int, num_outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": dtype, "device": torch.cuda.current_device()}
        self.down = nn.Linear(num_inputs, size, **options)
        self.up = nn.Linear(size, num_outputs, **options)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """What is added."""
        output: torch.Tensor = self.up(F.silu(self.down(hidden)))
        return output

    @torch.no_grad()
    def initialise(self, name: str, seed: int) -> None:
        """Draw `down` uniformly as nn.Linear does, from numbers that do not depend on the layout."""
        generator = torch.Generator().manual_seed(seed_of(seed, name))
        drawn = torch.rand(self.down.weight.shape, generator=generator, device="cpu") * 2 - 1
        self.down.weight.copy_(drawn / math.sqrt(self.down.in_features))
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            parameter.zero_()


class BottleneckAdapter(LinearAdapter):
    """At the row-parallel linear that a block ends with. `tap` is at the one that it begins with: beside the block."""

    def __init__(self, linear: AdaptableLinear, bottleneck: nn.Module, tap: "Tap | None" = None) -> None:
        super().__init__()
        self.bottleneck = bottleneck
        self.group = linear.tp_group
        # no child: it is the other linear's
        self._taps = () if tap is None else (tap,)
        mark_sequence_parallel(self.bottleneck, linear.sequence_parallel)

    def forward(self, linear: AdaptableLinear, input_: torch.Tensor) -> Output:
        """The block's output with what is added; its bias, if there is one, is added already."""
        output, bias = linear.run(input_)
        if bias is not None:
            output = output + bias
        if not self._taps:
            return output + self.bottleneck(output), None
        return output + self.bottleneck(self._taps[0].take()), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Sharded weights: the same on every tensor-parallel rank."""
        assert metadata is not None
        own: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.bottleneck.state_dict(prefix="", keep_vars=True),
            f"{prefix}bottleneck.",
            {},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return own


class Tap(LinearAdapter):
    """Keeps what a block takes until its last linear has run; nothing is changed, nothing learned."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: torch.Tensor | None = None

    def forward(self, linear: AdaptableLinear, input_: torch.Tensor) -> Output:
        """The linear's output."""
        output, bias, self._kept = linear.run_and_take(input_)
        return output, bias

    def take(self) -> torch.Tensor:
        """What the block took."""
        kept, self._kept = self._kept, None
        assert kept is not None, "a block's last linear has run before its first"
        return kept

    def sharded_state_dict(self, *_args: Any, **_kwargs: Any) -> dict[str, Any]:
        """Nothing."""
        return {}
