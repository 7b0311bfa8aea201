"""Megatron-Core configuration of a vision tower, derived from the language model's."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.config.layout import split_evenly
from megavlm.models.activations import ACTIVATIONS
from megavlm.models.architecture import VisionArchitecture


def tower_config(
    language: TransformerConfig,
    vision: VisionArchitecture,
    groups: ProcessGroupCollection,
    fp8: Mapping[str, Any] = MappingProxyType({}),
) -> TransformerConfig:
    """The tower has tensor parallelism and stages of its own, no context and no sequence parallelism.

    Args:
        language: the language model's configuration (precision, recompute and parameter initialisation carry over).
        vision: what the tower is made of.
        groups: of the encoder.
        fp8: Megatron-Core's knobs of FP8; without any the tower is not in FP8, whatever the language model is.
    """
    num_stages = groups.pp.size()
    return dataclasses.replace(
        language,
        num_layers=vision.num_computed_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        num_query_groups=vision.num_attention_heads,
        kv_channels=vision.hidden_size // vision.num_attention_heads,
        activation_func=ACTIVATIONS[vision.activation],
        layernorm_epsilon=vision.norm_epsilon,
        normalization=vision.normalization,
        gated_linear_unit=vision.gated_mlp,
        bias_activation_fusion=vision.gated_mlp and vision.activation == "silu",
        add_bias_linear=True,
        add_qkv_bias=vision.qkv_bias,
        qk_layernorm=vision.qk_norm_epsilon is not None,
        mrope_section=None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=groups.tp.size(),
        pipeline_model_parallel_size=num_stages,
        virtual_pipeline_model_parallel_size=None,
        pipeline_model_parallel_layout=_stage_layout(vision, num_stages) if num_stages > 1 else None,
        context_parallel_size=1,
        cp_comm_type=None,
        sequence_parallel=False,
        tp_comm_overlap=False,
        num_moe_experts=None,
        moe_ffn_hidden_size=None,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=groups.tp.size(),
        recompute_modules=["mlp" if module == "moe" else module for module in language.recompute_modules or ()],
        **({"fp8": None, "fp8_param": False} | dict(fp8)),
    )


def _stage_layout(vision: VisionArchitecture, num_stages: int) -> str:
    """The tower's layers by stage, in Megatron's notation, which wants an embedding and a loss at the ends."""
    counts = split_evenly(vision.num_computed_layers, num_stages)
    return "E" + "|".join("t" * count for count in counts) + "L"
