"""Decoder layers that read images through a gate (Flamingo): cross-attention and an MLP in front of every so manieth.

The features ride with the hidden states: slot 1 of [T, K, H] holds a visual token's feature where its placeholder
stands, and passes through every layer and pipeline stage unchanged. So each stage has them without a message of its
own, and their gradients come back the same way.

Source: Alayrac et al., arXiv 2204.14198, section 3.1.2 and figure 4; checked against transformers'
IdeficsGatedCrossAttentionLayer.

Shape suffixes: T tokens of the packed row, L tokens of this rank (T / cp), S those of its sequence-parallel part, V
visual tokens of the row, N heads of this rank, C channels of a head, H hidden size, K slots (2).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from megavlm.models.norm import mark_sequence_parallel
from megavlm.parallel.attention import gather_ranks
from megavlm.parallel.context import local_part, zigzag_index


@dataclass
class ImagesInRow(PackedSeqParams):
    """A packed row's borders, and which tokens see which image; every layer is handed it, recomputed ones too.

    Attributes:
        visual_V: int64, where the row's visual tokens stand once all context ranks' tokens are put together; one that
            nobody sees in a row without images.
        image_V: int64, the number of the image that each belongs to.
        seen_L: int64, the image that each token of this rank sees: the last before it in its sample, or its own; -1
            for none.
    """

    visual_V: torch.Tensor | None = None
    image_V: torch.Tensor | None = None
    seen_L: torch.Tensor | None = None


def images_in_row(
    is_visual_T: torch.Tensor, num_queries: int, borders: torch.Tensor, context_size: int, context_rank: int
) -> dict[str, torch.Tensor]:
    """The fields of `ImagesInRow` for a row of images of `num_queries` visual tokens each.

    Args:
        is_visual_T: bool.
        num_queries: visual tokens of an image.
        borders: int32 sample borders.
        context_size: context-parallel ranks.
        context_rank: this one.
    """
    number_T = (torch.cumsum(is_visual_T, 0) - 1) // num_queries
    samples = borders.to(torch.int64)
    lengths = samples[1:] - samples[:-1]
    # images that end before each sample begins: those must not be seen in it
    before = torch.where(samples[:-1] > 0, number_T[(samples[:-1] - 1).clamp(min=0)], -1)
    before_T = torch.repeat_interleave(before, lengths)
    seen_T = torch.where(number_T > before_T, number_T, -1)
    order_T = torch.cat([zigzag_index(borders, context_size, rank) for rank in range(context_size)])
    order_T = order_T.to(is_visual_T.device)
    visual_V = torch.nonzero(is_visual_T[order_T])[:, 0]
    image_V = number_T[order_T][visual_V]
    if not len(visual_V):
        # One that nobody sees: the layers' parameters get gradients of 0 instead of none, which overlapped reduction
        # would wait for.
        visual_V, image_V = visual_V.new_zeros(1), image_V.new_full((1,), -2)
    return {
        "visual_V": visual_V,
        "image_V": image_V,
        "seen_L": local_part(seen_T, borders, context_size, context_rank),
    }


class GatedCrossAttention(MegatronModule):
    """x + tanh(a) cross_attention(norm(x), features), then x + tanh(b) mlp(norm(x)); both gates begin closed."""

    def __init__(
        self, config: TransformerConfig, provider: BackendSpecProvider, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        self.context_group, self.head_dim = groups.cp, config.kv_channels
        size, width = config.hidden_size, config.num_attention_heads * config.kv_channels
        norm, column = provider.layer_norm(), provider.column_parallel_linear()
        linear = {"config": config, "bias": False, "tp_group": groups.tp, "skip_bias_add": False, "is_expert": False}
        first = {"init_method": config.init_method, "gather_output": False}
        self.input_layernorm = norm(config=config, hidden_size=size, eps=config.layernorm_epsilon)
        self.linear_query = column(size, width, **first, **linear)
        self.linear_key = column(size, width, **first, **linear)
        self.linear_value = column(size, width, **first, **linear)
        self.linear_proj = provider.row_parallel_linear()(
            width, size, init_method=config.output_layer_init_method, input_is_parallel=True, **linear
        )
        self.pre_mlp_layernorm = norm(config=config, hidden_size=size, eps=config.layernorm_epsilon)
        dense = MLPSubmodules(linear_fc1=column, linear_fc2=provider.row_parallel_linear())
        self.mlp = MLP(config, dense, ffn_hidden_size=config.ffn_hidden_size, tp_group=groups.tp)
        gates = {"attention_gate": nn.Parameter(torch.zeros(1, dtype=config.params_dtype))}
        gates["mlp_gate"] = nn.Parameter(torch.zeros(1, dtype=config.params_dtype))
        self.gates = nn.ParameterDict(gates)
        mark_sequence_parallel(self.gates, config.sequence_parallel)

    def forward(self, hidden_S1H: torch.Tensor, features_S1H: torch.Tensor, images: ImagesInRow) -> torch.Tensor:
        """Hidden states [S, 1, H] that have read the images."""
        read = self._read(self.input_layernorm(hidden_S1H), features_S1H, images)
        hidden_S1H = hidden_S1H + torch.tanh(self.gates["attention_gate"]) * read
        output, _ = self.mlp(self.pre_mlp_layernorm(hidden_S1H))
        return hidden_S1H + torch.tanh(self.gates["mlp_gate"]) * output

    def _read(self, hidden_S1H: torch.Tensor, features_S1H: torch.Tensor, images: ImagesInRow) -> torch.Tensor:
        assert images.visual_V is not None and images.image_V is not None and images.seen_L is not None
        query_LNC = self._heads(self.linear_query(hidden_S1H)[0])
        key_VNC, value_VNC = (
            self._visual(self._heads(linear(features_S1H)[0]), images.visual_V)
            for linear in (self.linear_key, self.linear_value)
        )
        sees_LV = images.seen_L[:, None] == images.image_V
        sees_any_L = images.seen_L >= 0
        # a token that sees nothing attends to everything, and is then set to 0: a softmax needs something
        mask_LV = sees_LV | ~sees_any_L[:, None]
        out_NLC = F.scaled_dot_product_attention(
            query_LNC.transpose(0, 1), key_VNC.transpose(0, 1), value_VNC.transpose(0, 1), attn_mask=mask_LV
        )
        out_LW = out_NLC.transpose(0, 1).flatten(1) * sees_any_L[:, None]
        output, _ = self.linear_proj(out_LW[:, None])
        return output

    def _heads(self, hidden_L1W: torch.Tensor) -> torch.Tensor:
        return hidden_L1W[:, 0].unflatten(-1, (-1, self.head_dim))

    def _visual(self, tokens_LNC: torch.Tensor, visual_V: torch.Tensor) -> torch.Tensor:
        """Of all context ranks' tokens those that are visual."""
        if self.context_group.size() > 1:
            tokens_LNC = gather_ranks(tokens_LNC, self.context_group).flatten(0, 1)
        return tokens_LNC.index_select(0, visual_V)


class GatedLayer(TransformerLayer):
    """A decoder layer with features in slot 1; every `interval`-th reads them first, the last one drops them."""

    def __init__(
        self,
        *args: Any,
        provider: BackendSpecProvider,
        interval: int,
        pg_collection: ProcessGroupCollection,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, pg_collection=pg_collection, **kwargs)
        reads = (self.layer_number - 1) % interval == 0
        self.cross = GatedCrossAttention(self.config, provider, pg_collection) if reads else None
        self.is_last = self.layer_number == self.config.num_layers

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the layer on slot 0; returns hidden states with the same slots, and the context."""
        hidden_SKH = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        main_S1H, features_S1H = hidden_SKH[:, :1].contiguous(), hidden_SKH[:, 1:]
        if self.cross is not None:
            main_S1H = self.cross(main_S1H, features_S1H, kwargs["packed_seq_params"])
        output, context = super().forward(main_S1H, *args[1:], **kwargs)
        return (output if self.is_last else torch.cat((output, features_S1H), dim=1)), context
