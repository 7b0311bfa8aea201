"""Tiny models whose vocabulary has a token for masks, a head for them, and rows with masks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer

from megavlm.config.tasks import SEGMENT_TOKEN


def add_segment_token(hf_dir: Path) -> Path:
    """Give a tiny model's tokenizer the token; its vocabulary has room for it."""
    tokenizer = AutoTokenizer.from_pretrained(hf_dir)
    tokenizer.add_tokens([SEGMENT_TOKEN])
    config = json.loads((hf_dir / "config.json").read_text())
    assert len(tokenizer) <= config.get("text_config", config)["vocab_size"]
    tokenizer.save_pretrained(hf_dir)
    return hf_dir


def write_mask_head(hf_dir: Path, width: int, seed: int = 4) -> dict[str, torch.Tensor]:
    """Write a head for masks beside a model, biases and all at random, and return its tensors."""
    config = json.loads((hf_dir / "config.json").read_text())
    hidden = config["text_config"]["hidden_size"]
    generator = torch.Generator().manual_seed(seed)
    shapes = {"query_in": (hidden, hidden), "query_out": (width, hidden), "image": (width, hidden)}
    tensors = {}
    for layer, shape in shapes.items():
        tensors[f"mask_head.{layer}.weight"] = torch.randn(shape, generator=generator) * hidden**-0.5
        tensors[f"mask_head.{layer}.bias"] = torch.randn(shape[0], generator=generator)
    (hf_dir / "mask_head").mkdir()
    save_file(tensors, hf_dir / "mask_head" / "model.safetensors", metadata={"format": "pt"})
    return tensors


def with_masks(row: dict[str, Any], root: Path, number: int, random: np.random.RandomState) -> dict[str, Any]:
    """The row with a mask for each image in its last answer, and one more of the first; without images none.

    Masks are polygons, or runs of pixels, in turn.
    """
    if not row["images"]:
        return row
    masks: list[Any] = []
    for image in [*range(len(row["images"])), 0]:
        with Image.open(root / row["images"][image]) as opened:
            width, height = opened.size
        left, right = sorted(random.randint(0, width + 1, 2).tolist())
        top, bottom = sorted(random.randint(0, height + 1, 2).tolist())
        segmentation: Any = [[left, top, right, top, (left + right) / 2, bottom]]
        if (number + image) % 2:
            inside = np.zeros((height, width), dtype=bool)
            inside[top:bottom, left:right] = True
            borders = np.flatnonzero(np.diff(inside.T.ravel(), prepend=False))
            counts = np.diff(borders, prepend=0, append=inside.size).tolist()
            segmentation = {"size": [height, width], "counts": counts}
        masks.append({"segmentation": segmentation, "image_id": image})
    answer = " and ".join([f"red square {SEGMENT_TOKEN}"] * len(masks))
    turns = row["messages"][:-1] + [row["messages"][-1] | {"content": answer}]
    return row | {"messages": turns, "masks": masks}
