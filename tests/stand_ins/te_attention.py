"""Attention over packed rows, on one rank and over context parallel ranks.

Shape suffixes: T tokens of the row, L tokens of this rank, H query heads, G key/value heads, D head dim.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.stand_ins.calls import contracted, version
from tests.stand_ins.te_collectives import Gather
from tests.stand_ins.te_modules import _Stateful

Group = dist.ProcessGroup | None


def positions(borders: list[int], cp_size: int, cp_rank: int) -> torch.Tensor:
    """Where in the row the tokens of a rank stand: of each sample the chunks r and 2 * cp - 1 - r of 2 * cp."""
    if cp_size == 1:
        return torch.arange(borders[-1])
    found = []
    for start, end in zip(borders[:-1], borders[1:], strict=True):
        assert (end - start) % (2 * cp_size) == 0, "each sample must divide into 2 * cp chunks"
        chunks = torch.arange(start, end).chunk(2 * cp_size)
        found += [chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]] if end > start else []
    return torch.cat(found)


class DotProductAttention(_Stateful):
    """`te.pytorch.DotProductAttention`, packed rows (`thd`) only."""

    @contracted(
        "DotProductAttention.__init__",
        "sequence_parallel",
        "get_rng_state_tracker",
        "tp_group",
        "layer_number",
        "cp_stream",
        "cp_global_ranks",
        "attn_mask_type",
    )
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None,
        attention_dropout: float,
        tp_size: int,
        attention_type: str,
        cp_group: Group,
        cp_comm_type: str,
        softmax_scale: float | None,
    ) -> None:
        super().__init__()
        assert attention_type == "self" and attention_dropout == 0.0
        self.num_heads, self.head_dim = num_attention_heads // tp_size, kv_channels
        self.num_groups = (num_gqa_groups or num_attention_heads) // tp_size
        self.scale = softmax_scale if softmax_scale is not None else kv_channels**-0.5
        self.cp_group, self.cp_comm_type = cp_group, cp_comm_type

    @contracted("DotProductAttention.forward", "max_seqlen_q", "max_seqlen_kv", "pad_between_seqs")
    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: Any,
        qkv_format: str,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_kv: torch.Tensor,
        attn_mask_type: str,
    ) -> torch.Tensor:
        """[L, H, D] to [L, H * D]."""
        assert qkv_format == "thd" and attention_mask is None and "padding" in attn_mask_type
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_kv)
        assert query_layer.shape[1:] == (self.num_heads, self.head_dim)
        assert key_layer.shape[1:] == value_layer.shape[1:] == (self.num_groups, self.head_dim)
        borders, size, rank = cu_seqlens_q.tolist(), 1, 0
        if self.cp_group is not None and self.cp_group.size() > 1:
            size, rank = self.cp_group.size(), self.cp_group.rank()
            assert attn_mask_type == "padding_causal"
            # real refusals of the version
            assert self.cp_comm_type != "all_gather" or version() >= (2, 18), "thd format is not supported!"
            assert self.cp_comm_type != "a2a" or self.num_heads % size == self.num_groups % size == 0
            key_layer, value_layer = (Gather.apply(tensor, self.cp_group) for tensor in (key_layer, value_layer))
        key_T = torch.cat([positions(borders, size, number) for number in range(size)])
        query_L = positions(borders, size, rank)
        sample = torch.bucketize(torch.arange(borders[-1]), torch.tensor(borders[1:]), right=True)
        mask_LT = sample[query_L][:, None] == sample[key_T]
        if attn_mask_type == "padding_causal":
            mask_LT &= query_L[:, None] >= key_T
        query_HLD, key_GTD, value_GTD = (
            tensor.transpose(0, 1)[None] for tensor in (query_layer, key_layer, value_layer)
        )
        out = F.scaled_dot_product_attention(
            query_HLD, key_GTD, value_GTD, attn_mask=mask_LT, scale=self.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1).flatten(1)
