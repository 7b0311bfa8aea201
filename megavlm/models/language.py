"""The language model: Megatron-Core's GPTModel, with explicit rotary positions and DeepStack-aware layers."""

from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megavlm.models.architecture import LanguageArchitecture
from megavlm.models.embedding_head import EmbeddingHead
from megavlm.models.experts import experts_spec, finish_experts
from megavlm.models.gated import GatedLayer
from megavlm.models.mask_head import MaskHead
from megavlm.models.rope import RotaryAngles
from megavlm.models.score import ScoreHead
from megavlm.models.specs import layer_spec


class DeepStackLayer(TransformerLayer):
    """A decoder layer that adds the next waiting DeepStack feature to its output.

    Hidden states are [T, K, H]: slot 0 is the hidden state, slots 1.. wait to be added, one a layer
    (Qwen3-VL adds feature i after decoder layer i). Layers without waiting slots, and rows without images, are plain.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the layer on slot 0; returns hidden states with one slot fewer, and the context."""
        hidden_TKH = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        if hidden_TKH.shape[1] == 1:
            return super().forward(hidden_TKH, *args[1:], **kwargs)
        output, context = super().forward(hidden_TKH[:, :1].contiguous(), *args[1:], **kwargs)
        added = output + hidden_TKH[:, 1:2]
        return torch.cat((added, hidden_TKH[:, 2:]), dim=1), context


def build_language_model(
    config: TransformerConfig,
    architecture: LanguageArchitecture,
    provider: LocalSpecProvider,
    groups: ProcessGroupCollection,
    num_deepstack: int,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
    moe_aux_loss_coeff: float = 0.0,
    gate_interval: int = 0,
) -> GPTModel:
    """One chunk of the language model.

    Args:
        config: Megatron-Core's configuration of the whole language model.
        architecture: what it is made of.
        provider: where its modules come from.
        groups: its process groups.
        num_deepstack: features that its first layers add.
        pre_process: whether this chunk holds the embedding.
        post_process: whether it holds the final norm and the output layer.
        vp_stage: which virtual chunk of this pipeline rank it is; None without interleaving.
        moe_aux_loss_coeff: weight of the experts' load-balancing loss.
        gate_interval: every so manieth layer reads the images by gated cross-attention; 0: none does.
    """
    layer_class: type[TransformerLayer] = DeepStackLayer if num_deepstack else TransformerLayer
    params: dict[str, Any] = {}
    if gate_interval:
        layer_class, params = GatedLayer, {"provider": provider, "interval": gate_interval}
    mlp = None if architecture.experts is None else experts_spec(provider, moe_aux_loss_coeff)
    spec = layer_spec(provider, AttnMaskType.causal, architecture.qk_norm, layer_class, params, mlp)
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=groups.pp.rank())
    model = GPTModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules([spec] * num_layers, layer_norm=provider.layer_norm()),
        vocab_size=architecture.vocab_size,
        max_sequence_length=architecture.max_positions,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=architecture.shares_embeddings,
        position_embedding_type="mrope",
        rotary_base=architecture.rotary_base,
        scatter_embedding_sequence_parallel=False,
        pg_collection=groups,
        vp_stage=vp_stage,
    )
    model.rotary_pos_emb = RotaryAngles(
        architecture.head_dim,
        architecture.rotary_base,
        architecture.mrope_section,
        architecture.mrope_interleaved,
        torch.device(torch.cuda.current_device()),
        architecture.rope_scaling,
    )
    if architecture.has_score_head and post_process:
        model.output_layer = ScoreHead(config, groups.tp)
    if architecture.embedding_dim and post_process:
        model.output_layer = EmbeddingHead(config, groups.tp, architecture.embedding_dim, architecture.has_match_head)
    if architecture.mask_head is not None and post_process:
        model.mask_head = MaskHead(config, groups.tp, architecture.mask_head.width)
    finish_experts(model, groups)
    return model
