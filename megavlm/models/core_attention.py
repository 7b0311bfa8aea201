"""The core attention module of the torch backend: packed rows only, context parallelism included."""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megavlm.parallel.attention import all_gather_attention, packed_attention, ring_attention

CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


class PrefixModule(nn.Module):
    """Gives keys and values [virtual tokens, key/value heads of this rank, head dim] in front of every sample's."""

    enabled = True


class PackedAttention(MegatronModule):
    """softmax(q k^T) v inside each sample of a packed row, on F.scaled_dot_product_attention.

    Takes the place of Megatron-Core's DotProductAttention / TEDotProductAttention in a layer spec.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None, "core attention takes its process groups as an argument"
        self.causal = attn_mask_type in CAUSAL
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self.context_group, self.tensor_group = pg_collection.cp, pg_collection.tp
        self.register_module("adapter", None)
        self.across_ranks = {"all_gather": all_gather_attention, "p2p": ring_attention}[cp_comm_type or "all_gather"]

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [T, heads, head_dim], this rank's tokens.
            key: [T, groups, head_dim].
            value: like key.
            attention_mask: must be None; samples are told apart by packed_seq_params.
            attn_mask_type: ignored, fixed at construction.
            attention_bias: must be None.
            packed_seq_params: sample borders of the whole row.

        Returns:
            [T, 1, heads * head_dim].
        """
        assert packed_seq_params is not None and attention_mask is None and attention_bias is None, "packed rows only"
        borders = packed_seq_params.cu_seqlens_q.tolist()
        prefix = self.adapter() if self.adapter is not None and self.adapter.enabled else None
        if self.context_group.size() == 1:
            dropout = self.dropout if self.training else 0.0
            out = packed_attention(query, key, value, borders, self.causal, self.scale, dropout, prefix)
        else:
            assert self.causal and self.dropout == 0.0, "context parallelism is causal and without dropout"
            options = {} if prefix is None else {"prefix": prefix}  # validation refuses it with a ring
            out = self.across_ranks(query, key, value, borders, self.context_group, self.scale, **options)
        return out.unsqueeze(1)
