"""From an architecture and a layout to the parts of the model that this rank holds."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.config.layout import language_pipeline_size
from megavlm.config.schema import ModelConfig, ParallelConfig
from megavlm.errors import use_error
from megavlm.models.architecture import Architecture, LanguageArchitecture
from megavlm.models.chunk import LanguageChunk
from megavlm.models.encoder import VisionEncoder
from megavlm.models.family import ModelFamily
from megavlm.models.head import leave_out_product
from megavlm.models.language import build_language_model
from megavlm.models.specs import provider_of
from megavlm.models.tower_config import tower_config
from megavlm.parallel.groups import Groups

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def transformer_config(
    architecture: Architecture,
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: str,
    fp8: Mapping[str, Any] = MappingProxyType({}),
) -> TransformerConfig:
    """Megatron-Core's configuration of the language model under a layout.

    `precision` is out of `DTYPES`; `fp8` are its own knobs of FP8 (`models.fp8.fp8_settings`), none: it is not in FP8.

    Fusions stay off but for SwiGLU's: those of Megatron-Core without Transformer Engine change the arithmetic (tanh for
    erf GELU) or need CUDA.

    Raises:
        UseError: messages are to overlap in a model whose linears have inputs of several lengths.
    """
    language, dtype = architecture.language, DTYPES[precision]
    if parallel.tp_comm_overlap and architecture.gate_interval:
        raise use_error(
            "parallel.tp_comm_overlap",
            "true with gated cross-attention",
            "false: its linears read rows of images, of other lengths",
            "set parallel.tp_comm_overlap=false",
        )
    interleaved = parallel.virtual_pipeline_model_parallel_size > 1
    config = TransformerConfig(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.ffn_hidden_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.num_query_groups,
        kv_channels=language.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=language.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=language.qkv_bias,
        qk_layernorm=language.qk_norm,
        # GPTModel insists on a section; RotaryAngles has the real one
        mrope_section=list(language.mrope_section or (language.head_dim // 2, 0, 0)),
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=language_pipeline_size(parallel),
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size if interleaved else None,
        pipeline_model_parallel_layout=parallel.pipeline_model_parallel_layout or None,
        context_parallel_size=parallel.context_parallel_size,
        cp_comm_type=parallel.cp_comm_type,
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=True,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=parallel.gradient_accumulation_fusion,
        tp_comm_overlap=parallel.tp_comm_overlap,
        apply_rope_fusion=False,
        use_cpu_initialization=False,
        # also marks which parameters are sharded, and how; the values are overwritten
        perform_initialization=True,
        **_experts(language, model, parallel),
        **_recompute(parallel),
        **fp8,
    )
    if language.rope_scaling is not None and language.rope_scaling.attention_factor != 1:
        # What Megatron-Core's attention multiplies cosines and sines by is made of these: 1 + mscale ln(factor) / 10.
        attention_factor = language.rope_scaling.attention_factor
        vars(config).update(
            yarn_rotary_scaling_factor=math.e, yarn_mscale=10 * (attention_factor - 1), yarn_mscale_all_dim=0.0
        )
    return config


def _experts(language: LanguageArchitecture, model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    if language.experts is None:
        return {}
    return {
        "num_moe_experts": language.experts.num_experts,
        "moe_router_topk": language.experts.top_k,
        # the softmax of the chosen logits is that over all, made to add up to 1 again
        "moe_router_pre_softmax": False,
        "moe_ffn_hidden_size": language.experts.ffn_hidden_size,
        "moe_router_load_balancing_type": "none",  # models/experts.py has its own
        "moe_grouped_gemm": model.backend == "te",
        "moe_token_dispatcher_type": parallel.moe_token_dispatcher_type,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size,
    }


def _recompute(parallel: ParallelConfig) -> dict[str, Any]:
    if parallel.recompute_granularity == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": parallel.recompute_method,
            "recompute_num_layers": parallel.recompute_num_layers,
        }
    if parallel.recompute_granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(parallel.recompute_modules)}
    return {}


def build_language_chunks(
    architecture: Architecture, config: TransformerConfig, model: ModelConfig, groups: Groups
) -> list[MegatronModule]:
    """This rank's chunks of the language model, weights uninitialised; one unless the schedule is interleaved.

    Empty on a rank that only encodes.
    """
    if groups.place is None:
        return []
    provider = provider_of(model.backend)
    num_virtual = config.virtual_pipeline_model_parallel_size or 1
    stage, num_stages = groups.place.stage, groups.topology.pipeline
    chunks: list[MegatronModule] = []
    for number in range(num_virtual):
        vp_stage = number if num_virtual > 1 else None
        language = build_language_model(
            config,
            architecture.language,
            provider,
            groups.language,
            architecture.num_deepstack,
            pre_process=stage == 0 and number == 0,
            post_process=stage == num_stages - 1 and number == num_virtual - 1,
            vp_stage=vp_stage,
            moe_aux_loss_coeff=model.moe_aux_loss_coeff,
            gate_interval=architecture.gate_interval,
        )
        if model.cross_entropy_loss_fusion and language.post_process:
            leave_out_product(language, groups.language)
        chunk = LanguageChunk(config, architecture, groups, language, vp_stage)
        chunks.append(Float16Module(config, chunk) if config.bf16 or config.fp16 else chunk)
    return chunks


def build_encoder(
    family: ModelFamily,
    architecture: Architecture,
    config: TransformerConfig,
    backend: str,
    groups: Groups,
    fp8: Mapping[str, Any] = MappingProxyType({}),
) -> VisionEncoder | None:
    """This rank's vision encoder, or its stage of it, weights uninitialised; None where there is none.

    `config` is the language model's, `fp8` the tower's own knobs of FP8.
    """
    if not groups.has_encoder:
        return None
    num_layers, num_stages = architecture.vision.num_computed_layers, groups.vision.pp.size()
    if num_stages > num_layers:
        raise use_error(
            "parallel.vision_pipeline_model_parallel_size",
            num_stages,
            f"at most the {num_layers} layers of the vision tower that are computed",
            f"set it to {num_layers} or less",
        )
    provider = provider_of(backend)
    encoder_config = tower_config(config, architecture.vision, groups.vision, fp8)
    vision = family.build_tower(encoder_config, architecture, provider, groups.vision)
    projector = None
    if groups.vision.pp.rank() == num_stages - 1:
        projector = family.build_projector(encoder_config, architecture, provider, groups.vision)
    encoder = VisionEncoder(encoder_config, architecture, groups, vision, projector)
    return encoder.to(config.params_dtype)


def unwrap(chunk: torch.nn.Module) -> LanguageChunk | VisionEncoder:
    """The model inside Megatron-Core's DDP and Float16Module wrappers."""
    module: Any = chunk
    while not isinstance(module, LanguageChunk | VisionEncoder):
        module = module.module
    return module
