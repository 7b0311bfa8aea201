import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.parity.reference import amplify_vision
from tests.tiny import write_tiny_llava, write_tiny_qwen3vl, write_tiny_qwen3vl_moe
from tests.tiny_anyres import write_tiny_llava_next, write_tiny_llava_onevision
from tests.tiny_internvl import write_tiny_internvl, write_tiny_internvl_6b
from tests.tiny_qwen2_5_vl import write_tiny_qwen2_5_vl

WRITERS = {
    "qwen3_vl": write_tiny_qwen3vl,
    "qwen3_vl_moe": write_tiny_qwen3vl_moe,
    "llava": write_tiny_llava,
    "llava_next": write_tiny_llava_next,
    "llava_onevision": write_tiny_llava_onevision,
    "qwen2_5_vl": write_tiny_qwen2_5_vl,
    "internvl": write_tiny_internvl,
    "internvl_6b": write_tiny_internvl_6b,
}

# Question, answer, and width and height of each image, which come before the question.
CONVERSATIONS = [
    ("what is in this image?", "a red square", [(64, 96)]),
    ("which is the largest, in both?", "the blue circle and nothing else 0 1 2 3", [(130, 40), (33, 71)]),
    ("the quick brown fox?", "jumps", []),
    ("which number is this?", "7", [(48, 48)]),
]


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory) -> dict[str, Path]:
    """A tiny model of each family, whose vision matters."""
    root = tmp_path_factory.mktemp("parity")
    return {name: amplify_vision(write(root / name)) for name, write in WRITERS.items()}


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    """The conversations with real images, as a user would write them."""
    root = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    lines = []
    for number, (question, answer, sizes) in enumerate(CONVERSATIONS):
        names = [f"{number}-{image}.png" for image in range(len(sizes))]
        for name, (width, height) in zip(names, sizes, strict=True):
            Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(root / name)
        messages = [
            {"role": "user", "content": "<image>" * len(sizes) + question},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"messages": messages, "images": names}))
    path = root / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
