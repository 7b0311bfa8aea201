"""Prefix tuning: in each layer, keys and values that are learned stand in front of every sample's.

Every token of a sample sees them, whatever rank it is on; they have no position. The ranks of tensor parallelism take
those of their heads out of the whole, and the gradients of all are summed.

Source: Li and Liang (arXiv 2101.00190), section 4; keys and values themselves are learned, without the MLP that the
paper makes them by during training.

Shape suffixes: P virtual tokens, G key/value heads (of this rank, or all), D head dim.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from megavlm.models.core_attention import PackedAttention, PrefixModule
from megavlm.peft.targets import seed_of

_DEVIATION = 0.02


class Prefix(PrefixModule):
    """Keys and values of one layer, all heads of them on every rank."""

    def __init__(self, attention: PackedAttention, num_heads: int, num_virtual_tokens: int, dtype: torch.dtype) -> None:
        """Make room for both.

        Args:
            attention: in front of whose keys and values they will stand.
            num_heads: key/value heads of the layer, of all tensor ranks together.
            num_virtual_tokens: P.
            dtype: of the model.
        """
        super().__init__()
        self.group = attention.tensor_group
        shape = (num_virtual_tokens, num_heads, attention.config.kv_channels)
        device = torch.cuda.current_device()
        self.key = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.value = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        for parameter in self.parameters():
            vars(parameter)["sequence_parallel"] = False

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[P, G, D] each: those of the heads that this rank has."""
        num_heads, size, rank = self.key.shape[1], self.group.size(), self.group.rank()
        if size == 1:
            return self.key, self.value
        # Several ranks have the same head where there are more ranks than heads.
        heads = slice(rank * num_heads // size, rank * num_heads // size + max(num_heads // size, 1))
        key, value = (copy_to_tensor_model_parallel_region(one, group=self.group) for one in (self.key, self.value))
        return key[:, heads], value[:, heads]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Sharded keys and values: the same on every tensor-parallel rank."""
        assert metadata is not None
        own: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return own

    @torch.no_grad()
    def initialise(self, name: str, seed: int) -> None:
        """Draw both from a narrow normal distribution, from numbers that do not depend on the layout."""
        for kind, parameter in self.named_parameters():
            generator = torch.Generator().manual_seed(seed_of(seed, f"{name}.{kind}"))
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * _DEVIATION)
