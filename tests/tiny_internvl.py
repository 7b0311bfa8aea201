"""A complete Hugging Face directory of a tiny random InternVL."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, InternVLConfig, InternVLForConditionalGeneration

from tests.tiny import QWEN_TEMPLATE, VOCAB_SIZE, make_tokenizer, write_model

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>", "<img>", "</img>", "<video>"]
# As the public directories have it: the placeholder alone, the processor puts borders around it.
TEMPLATE = QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\\n").replace(
    "<|vision_start|><|video_pad|><|vision_end|>", "<video>\\n"
)


def write_tiny_internvl(
    out_dir: Path,
    *,
    seed: int = 0,
    tie: bool = False,
    num_layers: int = 4,
    num_kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
    vision_changes: dict[str, Any] | None = None,
) -> Path:
    """Write a tiny InternVL (tiles of 28 pixels, 4 visual tokens each, Qwen2); returns `out_dir`."""
    tokenizer = make_tokenizer(SPECIALS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    token_id = tokenizer.convert_tokens_to_ids
    config = InternVLConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 8,
            "num_key_value_heads": num_kv_heads,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": tie,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": [28, 28],
            "patch_size": [7, 7],
            "attention_bias": True,
        }
        | (vision_changes or {}),
        tie_word_embeddings=tie,
        image_token_id=token_id("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    image_processor = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": "InternVLProcessor",
        "size": {"height": 28, "width": 28},
        "min_patches": 1,
        "max_patches": 6,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    generation = GenerationConfig(
        eos_token_id=[token_id("<|im_end|>"), token_id("<|endoftext|>")], pad_token_id=token_id("<|endoftext|>")
    )
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(config)
    with torch.no_grad():
        embeddings = model.model.vision_tower.embeddings
        for parameter in (embeddings.cls_token, embeddings.position_embeddings):
            parameter.normal_(0.0, 0.5)  # transformers leaves zeros
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.uniform_(0.5, 1.5)  # transformers leaves ones
    write_model(out_dir, model.to(dtype), generation, tokenizer, TEMPLATE, image_processor)
    path = Path(out_dir) / "tokenizer_config.json"
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"extra_special_tokens": named | {"video_token": "<video>"}})
    )
    return Path(out_dir)


def write_tiny_internvl_6b(out_dir: Path, **changes: Any) -> Path:
    """A tiny InternVL with what InternViT-6B has: RMSNorm, norms of query and key over all heads, q/k/v without bias.

    The layers' epsilon is another than that of query and key, which is always 1e-6.
    """
    vision = {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False, "layer_norm_eps": 1e-4}
    return write_tiny_internvl(out_dir, vision_changes=vision, **changes)
