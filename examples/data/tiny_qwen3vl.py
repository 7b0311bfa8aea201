"""Make a tiny, randomly initialised Qwen3-VL directory on the spot, with its own tokenizer and image processor.

The result loads like any downloaded checkpoint: `AutoModelForImageTextToText`, `AutoTokenizer` and `AutoImageProcessor`
all take the directory. Nothing is downloaded. Heads, key-value groups, feed-forward widths and the vocabulary divide by
two, and the number of decoder layers is even, so that the model can be cut over tensor-parallel and pipeline ranks. The
DeepStack features enter the first half of the decoder only, which keeps them on the first of two pipeline stages.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# The words of the template itself: they must become tokens even when no text holds them.
TEMPLATE_TEXTS = ("system\n", "user\n", "assistant\n")
# Qwen's own split: contractions, words with one leading space, single digits, punctuation, white space.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Of the grey values of handwriting, white ink on black: centred pixels let a model trained from nothing see the ink
# early, where the usual 0.5 gives every patch the same large offset.
PIXEL_MEAN = 0.13
PIXEL_STD = 0.31
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'video' or 'video' in part -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in part -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on `texts`; every digit is a token of its own, as in Qwen.

    Args:
        texts: what the vocabulary should be good at.
        vocab_size: most entries it may have; fewer are made when the texts hold fewer merges.

    Returns:
        The tokenizer, with Qwen's special tokens, `<|im_end|>` as its end and `<|endoftext|>` as its padding.

    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEMPLATE_TEXTS, *texts], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def build_config(
    tokenizer: PreTrainedTokenizerFast,
    *,
    vocab_size: int = 512,
    hidden_size: int = 96,
    ffn_size: int = 192,
    num_layers: int = 4,
    num_heads: int = 4,
    num_query_groups: int = 2,
    vision_hidden_size: int = 128,
    vision_ffn_size: int = 384,
    vision_num_layers: int = 4,
    vision_num_heads: int = 4,
    patch_px: int = 14,
    initializer_std: float = 0.1,
    tie_word_embeddings: bool = False,
) -> Qwen3VLConfig:
    """Return the configuration of a tiny Qwen3-VL: DeepStack on, interleaved multimodal rotary positions.

    Args:
        tokenizer: gives the ids of the special tokens.
        vocab_size: rows of the embedding, at least the tokenizer's; a multiple of 128 splits over any usual number of
            tensor-parallel ranks.
        hidden_size: channels of the decoder.
        ffn_size: inner channels of the decoder's gated feed-forward.
        num_layers: decoder layers.
        num_heads: query heads of the decoder, of 32 channels each.
        num_query_groups: key-value heads of the decoder.
        vision_hidden_size: channels of the image encoder.
        vision_ffn_size: inner channels of the image encoder's feed-forward.
        vision_num_layers: image encoder layers; DeepStack taps the last ones before the final one.
        vision_num_heads: heads of the image encoder.
        patch_px: side of a patch; 2 x 2 patches make one visual token.
        initializer_std: standard deviation of all random weights; about 1 / sqrt(hidden_size), since much
            smaller values hold up so narrow a model at the start.
        tie_word_embeddings: share the embedding with the output layer.

    Raises:
        ValueError: the tokenizer has more entries than `vocab_size`.

    """
    if len(tokenizer) > vocab_size:
        raise ValueError(f"vocab_size={vocab_size} is less than the tokenizer's {len(tokenizer)} entries")
    image, video, start, end = (
        tokenizer.convert_tokens_to_ids(token)
        for token in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    )
    text_config = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": ffn_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_query_groups,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "initializer_range": initializer_std,
        "tie_word_embeddings": tie_word_embeddings,
        # The three sections (time, height, width) fill half a head: 6 + 5 + 5 = 32 / 2.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
    }
    vision_config = {
        "depth": vision_num_layers,
        "hidden_size": vision_hidden_size,
        "intermediate_size": vision_ffn_size,
        "num_heads": vision_num_heads,
        "patch_size": patch_px,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": hidden_size,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": list(range(vision_num_layers - 1))[-(num_layers // 2) :],
        "initializer_range": initializer_std,
    }
    return Qwen3VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=tie_word_embeddings,
    )


def image_processor_config(patch_px: int, max_image_px: int = 448) -> dict:
    """Return the image processor's settings: images keep their size when its sides divide by two patches.

    Args:
        patch_px: side of a patch.
        max_image_px: side of a square image beyond whose area images are scaled down.

    """
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "size": {"shortest_edge": (2 * patch_px) ** 2, "longest_edge": max_image_px**2},
        "image_mean": [PIXEL_MEAN] * 3,
        "image_std": [PIXEL_STD] * 3,
        "patch_size": patch_px,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }


def write_model_dir(out_dir: str | Path, texts: Iterable[str], seed: int, **config_options) -> Path:
    """Write a whole checkpoint directory with random weights: model, tokenizer, chat template, image processor.

    Args:
        out_dir: the folder to fill; it is made when missing.
        texts: what the tokenizer is trained on.
        seed: of the random weights; the same seed gives the same weights.
        **config_options: keyword arguments of `build_config`, for instance `num_layers=2`.

    Returns:
        The folder.

    Raises:
        ValueError: the folder holds files already, which a loader might mix with the new ones.
        TypeError: an unknown keyword argument.

    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give a new folder")
    vocab_size = config_options.setdefault("vocab_size", 512)
    tokenizer = build_tokenizer(texts, vocab_size)
    config = build_config(tokenizer, **config_options)
    # Forked, so that making a model does not move the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor = image_processor_config(config.vision_config.patch_size)
    processor_class = {"processor_class": "Qwen3VLProcessor"}
    # Newer readers take the nested file, older ones the flat one: both say the same.
    _write_json(folder / "processor_config.json", {**processor_class, "image_processor": image_processor})
    _write_json(folder / "preprocessor_config.json", {**processor_class, **image_processor})
    return folder


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Write a model directory from the command line, its tokenizer trained on a text file or a jsonl of messages."""
    parser = argparse.ArgumentParser(description="Make a tiny, randomly initialised Qwen3-VL directory.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("texts", type=Path, help="the rows to train the tokenizer on: jsonl with messages")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rows = [json.loads(line) for line in options.texts.read_text(encoding="utf-8").splitlines()]
    texts = [message["content"].replace("<image>", "") for row in rows for message in row["messages"]]
    write_model_dir(options.out_dir, texts, options.seed)


if __name__ == "__main__":
    main()
