"""A tiny Qwen3-VL whose vocabulary has a token for each coordinate, and rows with boxes for it."""

from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from megavlm.config.tasks import BOX_MARKERS, NUM_COORDINATE_BINS, coordinate_token
from tests.tiny import write_tiny_qwen3vl

VOCAB_SIZE = 1536


def write_tiny_boxes(out_dir: Path) -> Path:
    """Write the directory and return it."""
    write_tiny_qwen3vl(out_dir, text_changes={"vocab_size": VOCAB_SIZE})
    tokenizer = AutoTokenizer.from_pretrained(out_dir)
    tokenizer.add_tokens([*map(coordinate_token, range(NUM_COORDINATE_BINS)), *BOX_MARKERS])
    assert len(tokenizer) <= VOCAB_SIZE
    tokenizer.save_pretrained(out_dir)
    return out_dir


def with_boxes(row: dict[str, Any], number: int, random: np.random.RandomState) -> dict[str, Any]:
    """The row with a box in its answer for each image, and one more; a row without images has none.

    Every third row has a point behind them, which is no box.
    """
    if not row["images"]:
        return row
    count = len(row["images"]) + 1
    answer = " and ".join(["<ref-object><bbox>"] * count)
    corners = [sorted_corners(random) for _ in range(count)]
    if number % 3 == 0:
        answer, corners = answer + " at <bbox>", [*corners, [0.25, 0.75]]
    objects = {"ref": ["red square"] * count, "bbox": corners, "bbox_type": "norm1", "image_id": [0] * len(corners)}
    turns = row["messages"][:-1] + [row["messages"][-1] | {"content": answer}]
    return row | {"messages": turns, "objects": objects}


def sorted_corners(random: np.random.RandomState) -> list[float]:
    """A box as shares of the sides."""
    left, right = sorted(random.uniform(0, 1, 2).round(3).tolist())
    top, bottom = sorted(random.uniform(0, 1, 2).round(3).tolist())
    return [left, top, right, bottom]
