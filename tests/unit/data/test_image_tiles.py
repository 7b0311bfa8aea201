"""Tiles against transformers' own image processor: the same tiles, pixel by pixel."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from megavlm.config.inputs import InputSpec
from megavlm.data.image_tiles import num_tiles
from megavlm.data.images import load_patches, read_image_spec, target_grid
from megavlm.errors import UseError

INPUTS = InputSpec(3, 512, "tiles", 7, 1, 2, 28, "linear", has_borders=True)
CONFIG = {
    "size": {"height": 28, "width": 28},
    "max_patches": 6,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def write_processor(folder: Path, **changes: object) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(CONFIG | changes))
    return folder


@pytest.mark.parametrize("size", [(28, 28), (64, 96), (300, 40), (33, 71), (40, 130), (500, 480), (20, 20)])
def test_tiles_equal_transformers(size: tuple[int, int], tmp_path: Path) -> None:
    spec = read_image_spec(write_processor(tmp_path), INPUTS)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    processor = GotOcr2ImageProcessorPil(**CONFIG)
    theirs = processor(images=[Image.fromarray(pixels)], return_tensors="pt", crop_to_patches=True)
    tiles = theirs["pixel_values"]
    frames, rows, columns = target_grid(spec, *size)
    assert (frames, rows, columns) == (len(tiles), 4, 4)
    expected = tiles.unfold(2, 7, 7).unfold(3, 7, 7).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * 49)
    assert torch.equal(load_patches(tmp_path / "image.png", spec), expected)


@pytest.mark.parametrize(("limits", "count"), [((1, 1), 1), ((1, 12), 13), ((4, 4), 5)])
def test_limits(limits: tuple[int, int], count: int) -> None:
    assert num_tiles(1120, 840, 280, *limits) == count


def test_another_size_than_the_towers(tmp_path: Path) -> None:
    with pytest.raises(UseError, match="expected height and width 28"):
        read_image_spec(write_processor(tmp_path, size={"height": 56, "width": 56}), INPUTS)
