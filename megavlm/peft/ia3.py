"""IA3: keys, values and the inner activations of MLPs are multiplied by learned vectors, one number a channel.

On a column-parallel linear the vector scales its outputs, on a row-parallel one its inputs; either way a rank has the
numbers of its own channels, and sees all tokens of them, so that nothing travels.

Source: IA3 (arXiv 2205.05638), section 3.3; numbers as in peft.
"""

import dataclasses
from typing import Any

import torch
from torch import nn

from megavlm.models.linear import AdaptableLinear, LinearAdapter, Output
from megavlm.peft.splits import Lies, splits_of
from megavlm.peft.targets import Target

# Projections whose outputs are scaled where all linears are meant; a tower's fused one as a whole, as peft does.
SCALED_OUTPUTS = ("k_proj", "v_proj", "key", "value", "qkv")
SCALED_INPUTS = ("linear_fc2",)


class Scale(nn.Module):
    """The vector of one projection."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.ia3_l = nn.Parameter(torch.ones(size, dtype=dtype, device=device)) if size else None

    def forward(self) -> torch.Tensor:
        """The vector; by a call, as DDP waits for gathered parameters when a module is called."""
        return torch.empty(0) if self.ia3_l is None else self.ia3_l


class Ia3Adapter(LinearAdapter):
    """IA3 of all projections of a linear."""

    def __init__(self, target: Target, dtype: torch.dtype) -> None:
        super().__init__()
        self.splits = splits_of(target)
        is_column = self.splits.is_column
        self.lies: Lies = {"ia3_l": "by output" if is_column else "by input"}
        sizes = {one.name: len(one.rows) if is_column else self.splits.num_inputs for one in target.projections}
        self.projections = nn.ModuleDict({name: Scale(size, dtype) for name, size in sizes.items()})
        self.splits.mark(self.projections, self.lies)

    def forward(self, linear: AdaptableLinear, input_: torch.Tensor) -> Output:
        """The linear's output, it or the input scaled."""
        if not self.splits.is_column:
            (vector,) = (one() for one in self.projections.values())
            return linear.run(input_ * vector)
        output, bias = linear.run(input_)
        scale = self.splits.in_order(torch.cat([one().to(output) for one in self.projections.values()]), 1.0)
        return output * scale, None if bias is None else bias * scale

    def part_of(self, projection: str, kind: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole vector."""
        return self.splits.part_of(projection, kind, whole, self.lies)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Sharded vectors by projection."""
        assert metadata is not None
        return self.splits.sharded(self.projections, self.lies, f"{prefix}projections.", sharded_offsets, metadata)


def scaled_part(target: Target) -> Target | None:
    """What IA3 scales of a linear when all linears are meant; None: nothing."""
    chosen = tuple(one for one in target.projections if one.name in SCALED_OUTPUTS)
    if not target.linear.is_column:
        chosen = target.projections if target.name.endswith(SCALED_INPUTS) else ()
    return dataclasses.replace(target, projections=chosen) if chosen else None
