"""Complete Hugging Face directories of tiny random models on tiles: LLaVA-NeXT and LLaVA-OneVision."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from tests.tiny import LLAVA_SPECIALS, LLAVA_TEMPLATE, QWEN_TEMPLATE, VOCAB_SIZE, make_tokenizer, write_model

TILE_PX = 28
NEXT_SIZES = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
ONEVISION_SIZES = [[height, width] for height in (28, 56, 84) for width in (28, 56, 84)]
ONEVISION_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
ONEVISION_TEMPLATE = QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>").replace(
    "<|vision_start|><|video_pad|><|vision_end|>", "<video>"
)
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": TILE_PX,
    "patch_size": 7,
}


def _text(tie: bool, num_layers: int, num_kv_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 8,
        "num_key_value_heads": num_kv_heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tie,
    }


def write_tiny_llava_next(
    out_dir: Path,
    *,
    seed: int = 0,
    tie: bool = False,
    num_layers: int = 4,
    num_kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a tiny LLaVA-NeXT (CLIP, feature layer -2, Mistral, tiles of 28 pixels); returns `out_dir`."""
    tokenizer = make_tokenizer(LLAVA_SPECIALS, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_TOWER, projection_dim=32),
        text_config=MistralConfig(**_text(tie, num_layers, num_kv_heads), head_dim=8, sliding_window=None),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        image_grid_pinpoints=NEXT_SIZES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=tie,
    )
    image_processor = {
        "image_processor_type": "LlavaNextImageProcessor",
        "processor_class": "LlavaNextProcessor",
        "do_convert_rgb": True,
        "size": {"shortest_edge": TILE_PX},
        "crop_size": {"height": TILE_PX, "width": TILE_PX},
        "image_grid_pinpoints": NEXT_SIZES,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    processor = {
        "processor_class": "LlavaNextProcessor",
        "patch_size": 7,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "image_token": "<image>",
    }
    generation = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=4)
    torch.manual_seed(seed)
    model = LlavaNextForConditionalGeneration(config).to(dtype)
    _write_processor(out_dir, processor)
    return write_model(out_dir, model, generation, tokenizer, LLAVA_TEMPLATE, image_processor)


def write_tiny_llava_onevision(
    out_dir: Path,
    *,
    seed: int = 0,
    tie: bool = True,
    num_layers: int = 4,
    num_kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a tiny LLaVA-OneVision (SigLIP, Qwen2, joined tiles shrunk to the area of two); returns `out_dir`."""
    tokenizer = make_tokenizer(ONEVISION_SPECIALS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    token_id = tokenizer.convert_tokens_to_ids
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_TOWER, vision_use_head=False),
        text_config=Qwen2Config(**_text(tie, num_layers, num_kv_heads)),
        image_token_index=token_id("<image>"),
        video_token_index=token_id("<video>"),
        image_grid_pinpoints=ONEVISION_SIZES,
        vision_aspect_ratio="anyres_max_2",
        tie_word_embeddings=tie,
    )
    image_processor = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "processor_class": "LlavaOnevisionProcessor",
        "do_convert_rgb": True,
        "size": {"height": TILE_PX, "width": TILE_PX},
        "image_grid_pinpoints": ONEVISION_SIZES,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": 16,
        "vision_aspect_ratio": "anyres_max_2",
        "vision_feature_select_strategy": "full",
        "image_token": "<image>",
        "video_token": "<video>",
    }
    generation = GenerationConfig(eos_token_id=token_id("<|im_end|>"), pad_token_id=token_id("<|endoftext|>"))
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(config).to(dtype)
    _write_processor(out_dir, processor)
    return write_model(out_dir, model, generation, tokenizer, ONEVISION_TEMPLATE, image_processor)


def _write_processor(out_dir: Path, processor: dict[str, Any]) -> None:
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
