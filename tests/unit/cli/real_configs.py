"""config.json of models at their real size, as far as a plan reads it: the published numbers of each model."""

from typing import Any

_CLIP_LARGE = {"model_type": "clip_vision_model"}  # the defaults are those of LLaVA's tower
_MISTRAL = {
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "rope_theta": 1e6,
    "vocab_size": 32064,
}

LLAVA_NEXT_7B: dict[str, Any] = {
    "model_type": "llava_next",
    "image_token_index": 32000,
    "vision_config": _CLIP_LARGE,
    "text_config": _MISTRAL,
}
LLAVA_ONEVISION_7B: dict[str, Any] = {
    "model_type": "llava_onevision",
    "image_token_index": 151646,
    "vision_feature_select_strategy": "full",
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152128,
    },
}
QWEN3_VL_30B_A3B: dict[str, Any] = {
    "model_type": "qwen3_vl_moe",
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "tie_word_embeddings": False,
    "vision_config": {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": 2048,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
    },
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e6,
        "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
    },
}


def _composed(connector: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "megavlm",
        "image_token_id": 32000,
        "vision_config": _CLIP_LARGE,
        "text_config": _MISTRAL,
        "connector_config": connector,
    }


PERCEIVER_7B = _composed({"type": "perceiver"})
QFORMER_7B = _composed({"type": "qformer"})
GATED_7B = _composed({"type": "gated_cross_attention"})
