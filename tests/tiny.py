"""Complete Hugging Face directories of tiny random models, made on the spot: nothing is ever downloaded.

Every 1-D parameter (norms, biases) is randomised, so that a wrong or missing one shows in a parity test.
Heads divide by 4, so that tensor parallelism up to 4 works.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

VOCAB_SIZE = 512

QWEN_SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
LLAVA_SPECIALS = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]

QWEN_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}"
    "{%- for content in message.content %}"
    "{%- if content.type == 'image' or 'image' in content %}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif content.type == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{%- elif 'text' in content %}{{- content.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

# The template that the public LLaVA-1.5 directories ship: images first, no end-of-sequence token after an answer.
LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

_TRAINING_TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "what is in this image? user assistant system USER: ASSISTANT:",
    "a red square and a blue circle 0 1 2 3 4 5 6 7 8 9 digits number largest",
] * 20


def make_tokenizer(specials: list[str], **special_roles: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most VOCAB_SIZE tokens; `specials` get the first ids, in order."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_TRAINING_TEXT, trainer)
    if "bos_token" in special_roles:
        bos = special_roles["bos_token"]
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, **special_roles)


def write_tiny_qwen3vl(
    out_dir: Path,
    *,
    seed: int = 0,
    tie: bool = True,
    num_layers: int = 4,
    num_kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
    text_changes: dict[str, Any] | None = None,
    vision_changes: dict[str, Any] | None = None,
    mixture: bool = False,
) -> Path:
    """Write a tiny Qwen3-VL (DeepStack, interleaved MRoPE) as a Hugging Face directory; returns `out_dir`.

    The changes replace keys of `text_config` and `vision_config`; a `mixture` has 4 experts in every layer.
    """
    config_class, model_class = Qwen3VLConfig, Qwen3VLForConditionalGeneration
    if mixture:
        config_class, model_class = Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
        text_changes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24} | (text_changes or {})
    tokenizer = make_tokenizer(QWEN_SPECIALS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    token_id = tokenizer.convert_tokens_to_ids
    config = config_class(
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 8,
            "num_key_value_heads": num_kv_heads,
            "head_dim": 16,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [3, 3, 2],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": tie,
        }
        | (text_changes or {}),
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1, 2],
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
        "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": 32 * 32, "longest_edge": 256 * 256},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    generation = GenerationConfig(
        eos_token_id=[token_id("<|im_end|>"), token_id("<|endoftext|>")], pad_token_id=token_id("<|endoftext|>")
    )
    torch.manual_seed(seed)
    model = model_class(config)
    return write_model(out_dir, model.to(dtype), generation, tokenizer, QWEN_TEMPLATE, image_processor)


def write_tiny_qwen3vl_moe(out_dir: Path, **options: Any) -> Path:
    """The same with a mixture of experts, of which a token has two of four; as on the hub, experts are [E, in, out]."""
    write_tiny_qwen3vl(out_dir, mixture=True, tie=options.pop("tie", False), **options)
    transpose_experts(out_dir)
    config = json.loads((out_dir / "config.json").read_text())
    config["text_config"]["num_experts"] = config["text_config"].pop("num_local_experts")
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return out_dir


def transpose_experts(hf_dir: Path) -> None:
    """From one layout of expert matrices to the other."""
    tensors = load_file(hf_dir / "model.safetensors")
    for name, tensor in tensors.items():
        if ".mlp.experts." in name:
            tensors[name] = tensor.transpose(1, 2).contiguous()
    save_file(tensors, hf_dir / "model.safetensors", metadata={"format": "pt"})


def write_tiny_llava(
    out_dir: Path,
    *,
    seed: int = 0,
    tie: bool = False,
    num_layers: int = 4,
    num_kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
    text_changes: dict[str, Any] | None = None,
) -> Path:
    """Write a tiny LLaVA-1.5 (CLIP, feature layer -2, MLP projector, Llama) directory; returns `out_dir`."""
    tokenizer = make_tokenizer(LLAVA_SPECIALS, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    token_id = tokenizer.convert_tokens_to_ids
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=28,
            patch_size=7,
            projection_dim=32,
        ),
        text_config=LlamaConfig(
            **{
                "vocab_size": VOCAB_SIZE,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": num_layers,
                "num_attention_heads": 8,
                "num_key_value_heads": num_kv_heads,
                "head_dim": 8,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 2048,
                "bos_token_id": token_id("<s>"),
                "eos_token_id": token_id("</s>"),
                "pad_token_id": token_id("<pad>"),
                "tie_word_embeddings": tie,
            }
            | (text_changes or {})
        ),
        image_token_index=token_id("<image>"),
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=tie,
    )
    image_processor = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
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
    generation = GenerationConfig(
        bos_token_id=token_id("<s>"), eos_token_id=token_id("</s>"), pad_token_id=token_id("<pad>")
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": 7,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "image_token": "<image>",
    }
    (Path(out_dir)).mkdir(parents=True, exist_ok=True)
    (Path(out_dir) / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    return write_model(out_dir, model.to(dtype), generation, tokenizer, LLAVA_TEMPLATE, image_processor)


def write_model(
    out_dir: Path,
    model: PreTrainedModel,
    generation: GenerationConfig,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    image_processor: dict[str, Any],
) -> Path:
    """Write a directory; every 1-D parameter is randomised. Returns `out_dir`."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    model.generation_config = generation
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    (out_dir / "chat_template.jinja").write_text(template)
    (out_dir / "preprocessor_config.json").write_text(json.dumps(image_processor, indent=2) + "\n")
    return out_dir
