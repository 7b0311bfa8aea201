"""Megatron-Core configuration of a vision tower, derived from the language model's."""

import dataclasses

from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.models.activations import ACTIVATIONS
from megavlm.models.architecture import VisionArchitecture


def tower_config(
    language: TransformerConfig,
    vision: VisionArchitecture,
    tensor_parallel_size: int,
    normalization: str = "LayerNorm",
    gated_mlp: bool = False,
) -> TransformerConfig:
    """The tower sits whole on one pipeline rank: no pipeline, no context and no sequence parallelism of its own.

    Args:
        language: the language model's configuration (precision, recompute and parameter initialisation carry over).
        vision: what the tower is made of.
        tensor_parallel_size: of the tower.
        normalization: LayerNorm or RMSNorm.
        gated_mlp: whether its MLP is gated (SwiGLU).
    """
    return dataclasses.replace(
        language,
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        num_query_groups=vision.num_attention_heads,
        kv_channels=vision.hidden_size // vision.num_attention_heads,
        activation_func=ACTIVATIONS[vision.activation],
        layernorm_epsilon=vision.norm_epsilon,
        normalization=normalization,
        gated_linear_unit=gated_mlp,
        add_bias_linear=True,
        add_qkv_bias=True,
        qk_layernorm=False,
        mrope_section=None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tensor_parallel_size,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        pipeline_model_parallel_layout=None,
        context_parallel_size=1,
        cp_comm_type=None,
        sequence_parallel=False,
        variable_seq_lengths=False,
    )
