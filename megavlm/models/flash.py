"""Core attention of the `flash` backend: flash-attn's kernel for packed rows.

Imported only where flash-attn is.
"""

from typing import Any

import torch
from flash_attn import flash_attn_varlen_func
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megavlm.models import kernels
from megavlm.models.core_attention import PackedAttention
from megavlm.parallel.attention import gather_ranks, gathered_segments


class FlashPackedAttention(PackedAttention):
    """softmax(q k^T) v inside each sample of a packed row.

    Under context parallelism keys and values of all ranks are gathered; a rank's two chunks of a sample are then
    segments that see the sample's beginning: flash-attn (from 2.1 on) lays a causal mask at the last key.
    """

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
        """Attend; arguments and result are those of `PackedAttention`."""
        assert packed_seq_params is not None and attention_mask is None and attention_bias is None, "packed rows only"
        borders_q = borders_k = packed_seq_params.cu_seqlens_q
        longest_q = longest_k = packed_seq_params.max_seqlen_q
        if self.context_group.size() > 1:
            assert self.causal and self.dropout == 0.0, "context parallelism is causal and without dropout"
            segments = gathered_segments(borders_q.tolist(), self.context_group.size(), self.context_group.rank())
            key, value = (
                gather_ranks(tensor, self.context_group).flatten(0, 1)[segments.keys.to(tensor.device)]
                for tensor in (key, value)
            )
            borders_q, borders_k = (x.to(query.device) for x in (segments.borders_q, segments.borders_k))
            longest_q, longest_k = segments.longest_q, segments.longest_k
        out: torch.Tensor = flash_attn_varlen_func(
            query,
            key,
            value,
            cu_seqlens_q=borders_q,
            cu_seqlens_k=borders_k,
            max_seqlen_q=longest_q,
            max_seqlen_k=longest_k,
            dropout_p=self.dropout if self.training else 0.0,
            softmax_scale=self.scale,
            causal=self.causal,
        )
        return out.flatten(1)[:, None]


class FlashAttention:
    """flash-attn's attention, or torch's where its kernel refuses (`kernels.py`)."""

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, **kwargs: Any
    ) -> nn.Module:
        """Build the module."""
        kind = FlashPackedAttention if kernels.takes(config, "flash", attn_mask_type) else PackedAttention
        return kind(config, layer_number, attn_mask_type, **kwargs)
