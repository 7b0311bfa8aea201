"""From an architecture and a layout to the model chunks of this rank."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.config.schema import ModelConfig, ParallelConfig
from megavlm.models.architecture import Architecture
from megavlm.models.family import ModelFamily
from megavlm.models.language import build_language_model
from megavlm.models.specs import provider_of
from megavlm.models.tower_config import tower_config
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel.groups import Groups

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(
    architecture: Architecture, model: ModelConfig, parallel: ParallelConfig, precision: str
) -> TransformerConfig:
    """Megatron-Core's configuration of the language model under a layout.

    Fusions stay off: those of Megatron-Core without Transformer Engine change the arithmetic (tanh for erf GELU) or
    need CUDA.
    """
    language, dtype = architecture.language, DTYPES[precision]
    interleaved = parallel.virtual_pipeline_model_parallel_size > 1
    return TransformerConfig(
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
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size if interleaved else None,
        pipeline_model_parallel_layout=parallel.pipeline_model_parallel_layout or None,
        context_parallel_size=parallel.context_parallel_size,
        cp_comm_type=parallel.cp_comm_type,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        calculate_per_token_loss=True,
        # Microbatches differ in length. The interleaved schedule cannot exchange shapes (with two ranks, the next and
        # the previous one are the same peer, and messages would mix), so there every microbatch of a step is padded.
        variable_seq_lengths=parallel.pipeline_model_parallel_size > 1 and not interleaved,
        # Measured with megatron-core 0.16.1 on gloo: batched p2p with overlap off swaps messages under PP2 x VPP2, and
        # freeing outputs corrupts tensors that are still being sent.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        use_cpu_initialization=False,
        # also marks which parameters are sharded, and how; the values are overwritten
        perform_initialization=True,
        moe_token_dispatcher_type="alltoall",
        **_recompute(parallel),
    )


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


def build_chunks(
    family: ModelFamily,
    architecture: Architecture,
    config: TransformerConfig,
    backend: str,
    groups: Groups,
) -> list[MegatronModule]:
    """This rank's model chunks, weights uninitialised; one unless the schedule is interleaved."""
    virtual = config.virtual_pipeline_model_parallel_size
    provider = provider_of(backend)
    chunks = []
    for number in range(virtual or 1):
        chunk = _build_chunk(family, architecture, config, provider, groups, number if virtual else None)
        chunks.append(Float16Module(config, chunk) if config.bf16 else chunk)
    return chunks


def _build_chunk(
    family: ModelFamily,
    architecture: Architecture,
    config: TransformerConfig,
    provider: LocalSpecProvider,
    groups: Groups,
    vp_stage: int | None,
) -> VisionLanguageModel:
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    language = build_language_model(
        config, architecture.language, provider, groups.language, architecture.num_deepstack, first, last, vp_stage
    )
    vision = projector = None
    if first:
        encoder_config = tower_config(config, architecture.vision, groups.vision.tp.size())
        vision = family.build_tower(encoder_config, architecture, provider, groups.vision)
        projector = family.build_projector(encoder_config, architecture, provider, groups.vision)
        if groups.vision.tp.size() < groups.tensor.size():
            _mark_replicated(vision, projector)
    return VisionLanguageModel(
        config, architecture, groups, language, vision, projector, fixed_slots=vp_stage is not None, vp_stage=vp_stage
    )


def _mark_replicated(*modules: torch.nn.Module) -> None:
    """Every tensor-parallel rank holds the whole encoder: its gradients count once in the gradient norm."""
    for module in modules:
        for parameter in module.parameters():
            vars(parameter)["tensor_model_parallel"] = False


def unwrap(chunk: torch.nn.Module) -> VisionLanguageModel:
    """The model inside Megatron-Core's DDP and Float16Module wrappers."""
    module: Any = chunk
    while not isinstance(module, VisionLanguageModel):
        module = module.module
    return module
