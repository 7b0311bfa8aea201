"""Answers of an exported model through transformers alone: its model, tokenizer and image processor.

Nothing of this project's models is involved, so that it shows what somebody who downloads the directory gets.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from megavlm.data.media import open_media
from megavlm.data.readers import IMAGE_PLACEHOLDER
from megavlm.data.sample import Media, Sample
from megavlm.errors import RunError, UseError

EMBEDDING_HEAD = {"embedding_head.weight", "logit_scale", "logit_bias"}
"""What the export of an embedding model holds beside a model with words."""


def load_checked(hf_dir: str | Path) -> Any:
    """Load a model in fp32; of an embedding model that was exported, all but its head.

    Raises:
        RunError: a tensor is missing or left over.
    """
    model, info = AutoModelForImageTextToText.from_pretrained(
        hf_dir, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    if "embedding_head" in model.config.to_dict():
        info["unexpected_keys"] = set(info["unexpected_keys"]) - EMBEDDING_HEAD
    problems = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if problems:
        raise RunError(f"{hf_dir}: transformers reports {problems}")
    return model.eval()


@torch.no_grad()
def generate_answers(
    hf_dir: str | Path, samples: Sequence[Sample], max_new_tokens: int, batch_size: int = 32
) -> list[str]:
    """Greedy answers to samples (their last assistant turn is dropped).

    Args:
        hf_dir: Hugging Face directory.
        samples: rows; images are read from their paths.
        max_new_tokens: of each answer.
        batch_size: samples answered together.

    Raises:
        RunError: the directory does not load cleanly.
    """
    model = load_checked(hf_dir)
    tokenizer = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)
    tokenizer.padding_side = "left"
    processor = AutoImageProcessor.from_pretrained(hf_dir, local_files_only=True)
    answers: list[str] = []
    for start in range(0, len(samples), batch_size):
        inputs = model_inputs(samples[start : start + batch_size], tokenizer, processor, model)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]
    return answers


def model_inputs(samples: Sequence[Sample], tokenizer: Any, processor: Any, model: Any) -> dict[str, Any]:
    """Model inputs of a batch, left-padded: what a processor would make (some need torchvision, for videos).

    Args:
        samples: their last assistant turn is dropped.
        tokenizer: transformers' own.
        processor: transformers' own image processor.
        model: of the same directory.
    """
    if any(sample.videos for sample in samples):
        raise UseError("transformers' video processors need torchvision, which is not used here; ask our own model")
    image_token = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    pixels, counts = _pixels(samples, processor, model)
    before, after = _borders(tokenizer, model.config)
    texts = []
    for sample in samples:
        turns = sample.turns[:-1] if sample.turns[-1].role == "assistant" else sample.turns
        messages = [{"role": turn.role, "content": _parts(turn.text)} for turn in turns]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        pieces = text.split(image_token)
        filled = pieces[0]
        for piece in pieces[1:]:
            filled += before + image_token * counts.pop(0) + after + piece
        texts.append(filled)
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    inputs = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], **pixels}
    if "image_grid_thw" in pixels:
        inputs["mm_token_type_ids"] = (encoded["input_ids"] == model.config.image_token_id).int()
    return inputs


def _pixels(samples: Sequence[Sample], processor: Any, model: Any) -> tuple[dict[str, Any], list[int]]:
    """What the image processor makes of all images, and how many tokens each becomes."""
    rows = [[_image(media) for media in sample.images] for sample in samples if sample.images]
    images = [image for row in rows for image in row]
    config = model.config
    if not images:
        return {}, []
    if config.model_type == "internvl":
        pixels = dict(processor(images=images, return_tensors="pt", crop_to_patches=True))
        return pixels, [config.image_seq_length * int(number) for number in pixels.pop("num_patches")]
    if config.model_type in ("llava_next", "llava_onevision"):
        pixels = dict(processor(images=rows if config.model_type == "llava_onevision" else images, return_tensors="pt"))
        return pixels, [len(feature) for feature in model.get_image_features(**pixels).pooler_output]
    pixels = dict(processor(images=images, return_tensors="pt"))
    if "image_grid_thw" in pixels:
        return pixels, [int(grid.prod()) // processor.merge_size**2 for grid in pixels["image_grid_thw"]]
    return pixels, [config.image_seq_length] * len(images)


def _image(media: Media) -> Image.Image:
    with open_media(media) as file, Image.open(file) as image:
        return image.convert("RGB")


def _borders(tokenizer: Any, config: Any) -> tuple[str, str]:
    """Tokens around an image, which InternVL's processor adds."""
    if config.model_type != "internvl":
        return "", ""
    named = tokenizer.special_tokens_map
    return named["start_image_token"], named["end_image_token"]


def _parts(text: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE_PLACEHOLDER)):
        if number:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
