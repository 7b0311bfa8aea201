"""Hugging Face directories of tiny random parts of a model: vision towers, text-only language models."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.tiny import VOCAB_SIZE, make_tokenizer

DECODERS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}

# Texts only, as the templates of language models are.
TEXT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
CLIP_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
}


def write_tiny_clip(out_dir: Path, *, whole: bool = True, seed: int = 0) -> Path:
    """A CLIP model, with its text half or without."""
    torch.manual_seed(seed)
    model: PreTrainedModel
    if whole:
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = CLIPModel(CLIPConfig(vision_config=_VISION, text_config=text, projection_dim=16))
    else:
        model = CLIPVisionModel(CLIPVisionConfig(**_VISION))
    _write(out_dir, model)
    (out_dir / "preprocessor_config.json").write_text(json.dumps(CLIP_PROCESSOR))
    return out_dir


SIGLIP_PROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "size": {"height": 28, "width": 28},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 1 / 255,
}


def write_tiny_siglip(out_dir: Path, *, whole: bool = True, seed: int = 0) -> Path:
    """A SigLIP model, with its text half or without; its pooling head is there."""
    torch.manual_seed(seed)
    model: PreTrainedModel
    if whole:
        text = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = SiglipModel(SiglipConfig(vision_config=_VISION, text_config=text))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**_VISION))
    _write(out_dir, model)
    (out_dir / "preprocessor_config.json").write_text(json.dumps(SIGLIP_PROCESSOR))
    return out_dir


def write_tiny_decoder(
    out_dir: Path, kind: str, *, tie: bool = False, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A text-only language model with tokenizer and chat template; `changes` replace keys of its config."""
    tokenizer = make_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    keys: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tie,
    }
    if kind == "mistral":
        keys["sliding_window"] = None
    assert keys["vocab_size"] <= VOCAB_SIZE
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(DECODERS[kind](**keys | changes)).to(dtype)
    _write(out_dir, model)
    tokenizer.chat_template = TEXT_TEMPLATE
    tokenizer.save_pretrained(out_dir)
    return out_dir


def _write(out_dir: Path, model: PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(out_dir)
