import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from megavlm.config.inputs import InputSpec
from tests.tiny import VOCAB_SIZE, write_tiny_llava, write_tiny_qwen3vl

QWEN_INPUTS = InputSpec(
    image_token_id=5,
    vocab_size=VOCAB_SIZE,
    image_kind="dynamic",
    patch_px=16,
    temporal_patch_size=2,
    merge_size=2,
    image_px=0,
    position_kind="mrope",
)
LLAVA_INPUTS = InputSpec(
    image_token_id=3,
    vocab_size=VOCAB_SIZE,
    image_kind="square",
    patch_px=7,
    temporal_patch_size=1,
    merge_size=1,
    image_px=28,
    position_kind="linear",
)


@pytest.fixture(scope="session")
def qwen_dir(tmp_path_factory) -> Path:
    return write_tiny_qwen3vl(tmp_path_factory.mktemp("models") / "qwen")


@pytest.fixture(scope="session")
def llava_dir(tmp_path_factory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("models") / "llava")


def draw_image(path: Path, width: int = 64, height: int = 48, seed: int = 0, mode: str = "RGB", **save) -> Path:
    """A picture with edges, gradients and noise, so that every pixel matters; no side is like another."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width)[None, :, None] + np.linspace(0, 50, height)[:, None, None]
    pixels = (ramp + rng.integers(0, 30, (height, width, 3))).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    ImageDraw.Draw(image).ellipse((0, 0, width // 2, height // 3), fill=(250, 20 * (seed % 10), 30))
    image.convert(mode).save(path, **save)
    return path


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
