"""A complete Hugging Face directory of a tiny random Qwen2.5-VL."""

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.tiny import QWEN_SPECIALS, QWEN_TEMPLATE, VOCAB_SIZE, make_tokenizer, write_model


def write_tiny_qwen2_5_vl(
    out_dir: Path,
    *,
    seed: int = 0,
    tie: bool = True,
    num_layers: int = 4,
    num_kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
    text_changes: dict[str, Any] | None = None,
    vision_changes: dict[str, Any] | None = None,
) -> Path:
    """Write a tiny Qwen2.5-VL (windows of 2 x 2 visual tokens, chunked MRoPE); returns `out_dir`."""
    tokenizer = make_tokenizer(QWEN_SPECIALS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    token_id = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 8,
            "num_key_value_heads": num_kv_heads,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
            "tie_word_embeddings": tie,
        }
        | (text_changes or {}),
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1, 2],
        }
        | (vision_changes or {}),
        tie_word_embeddings=tie,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    image_processor = {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen2_5_VLProcessor",
        "size": {"shortest_edge": 28 * 28, "longest_edge": 224 * 224},
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    generation = GenerationConfig(
        eos_token_id=[token_id("<|im_end|>"), token_id("<|endoftext|>")], pad_token_id=token_id("<|endoftext|>")
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    return write_model(out_dir, model.to(dtype), generation, tokenizer, QWEN_TEMPLATE, image_processor)
