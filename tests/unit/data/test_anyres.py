"""Tiles of images of any size against transformers' own image processors: the same pixels and number of tokens."""

import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from megavlm.config.inputs import InputSpec
from megavlm.data.images import load_patches, read_image_spec, target_grid
from megavlm.errors import UseError

SIZES = tuple((height, width) for height in (28, 56, 84) for width in (28, 56, 84))
NEXT = InputSpec(3, 512, "anyres", 7, 1, 1, 28, "linear", tile_sizes=SIZES)
ONEVISION = InputSpec(3, 512, "anyres", 7, 1, 1, 28, "linear", tile_sizes=SIZES, max_tile_area=2, tiles_alone=True)
NEXT_CONFIG: dict[str, Any] = {
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
    "image_grid_pinpoints": [list(size) for size in SIZES],
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
ONEVISION_CONFIG: dict[str, Any] = {
    "size": {"height": 28, "width": 28},
    "image_grid_pinpoints": [list(size) for size in SIZES],
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.4, 0.3],
}
PIXELS = [(28, 28), (64, 96), (300, 40), (33, 71), (41, 130), (500, 480), (20, 20), (1, 1), (84, 85), (3, 300)]


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


def picture(folder: Path, size: tuple[int, int]) -> tuple[Path, Image.Image]:
    pixels = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    return folder / "image.png", Image.fromarray(pixels)


def tiles_of(patches: torch.Tensor, num_tiles: int) -> torch.Tensor:
    """Patches row by row back to [tiles, 3, height, width]."""
    return patches.view(num_tiles, 4, 4, 3, 7, 7).permute(0, 3, 1, 4, 2, 5).reshape(num_tiles, 3, 28, 28)


@pytest.mark.parametrize("size", PIXELS)
def test_next(tmp_path: Path, size: tuple[int, int]) -> None:
    spec = read_image_spec(write(tmp_path, NEXT_CONFIG), NEXT)
    path, image = picture(tmp_path, size)
    processor = LlavaNextImageProcessorPil(**NEXT_CONFIG)
    theirs = processor(images=[image], return_tensors="pt")["pixel_values"][0]
    grid = target_grid(spec, *size)
    assert torch.equal(tiles_of(load_patches(path, spec), grid[0]), theirs)
    counter: Any = types.SimpleNamespace(image_processor=processor, patch_size=7, num_additional_image_tokens=0)
    counter._get_unpadded_features = types.MethodType(LlavaNextProcessor._get_unpadded_features, counter)
    assert NEXT.num_image_tokens(grid) == LlavaNextProcessor._get_number_of_features(counter, size[1], size[0], 28, 28)


@pytest.mark.parametrize("size", PIXELS)
@pytest.mark.parametrize("num_images", [1, 2])
def test_onevision(tmp_path: Path, size: tuple[int, int], num_images: int) -> None:
    spec = read_image_spec(write(tmp_path, ONEVISION_CONFIG), ONEVISION)
    path, image = picture(tmp_path, size)
    processor = LlavaOnevisionImageProcessorPil(**ONEVISION_CONFIG)
    theirs = processor(images=[[image] * num_images], return_tensors="pt")["pixel_values"][0]
    grid = target_grid(spec, *size, num_images)
    assert torch.equal(tiles_of(load_patches(path, spec, num_images), grid[0]), theirs)
    if num_images > 1:
        assert grid == (1, 4, 4, 0, 0, 0) and ONEVISION.num_image_tokens(grid) == 17
        return
    counter: Any = types.SimpleNamespace(
        image_processor=processor, num_image_tokens=16, vision_aspect_ratio="anyres_max_2"
    )
    counter._get_unpadded_features = types.MethodType(LlavaOnevisionProcessor._get_unpadded_features, counter)
    expected = LlavaOnevisionProcessor._get_number_of_features(counter, size[1], size[0], 28, 28)
    assert ONEVISION.num_image_tokens(grid) == expected


def test_some_images_are_cut_and_some_are_shrunk(tmp_path: Path) -> None:
    spec = read_image_spec(write(tmp_path, ONEVISION_CONFIG), ONEVISION)
    grids = [target_grid(spec, *size) for size in PIXELS]
    whole = [(grid[0] - 1) // grid[3] * 4 * grid[3] * 4 == grid[4] * grid[5] for grid in grids]
    assert any(whole) and not all(whole)
    shrunk = [ONEVISION.joined_size(grid) != grid[4:] for grid in grids]
    assert any(shrunk) and not all(shrunk)


@pytest.mark.parametrize(
    ("inputs", "config", "changes", "part"),
    [
        (NEXT, NEXT_CONFIG, {"crop_size": {"height": 56, "width": 56}}, "crop_size"),
        (NEXT, NEXT_CONFIG, {"size": {"shortest_edge": 56}}, "shortest_edge 28, a tile's side"),
        (NEXT, NEXT_CONFIG, {"image_grid_pinpoints": [[28, 56]]}, "image_grid_pinpoints: got 1 sizes"),
        (ONEVISION, ONEVISION_CONFIG, {"size": {"height": 56, "width": 56}}, "the vision tower's image_size"),
    ],
)
def test_a_processor_of_another_model(
    tmp_path: Path, inputs: InputSpec, config: dict[str, Any], changes: dict[str, Any], part: str
) -> None:
    with pytest.raises(UseError) as caught:
        read_image_spec(write(tmp_path, config | changes), inputs)
    assert part in str(caught.value)


@pytest.mark.parametrize("size", [(64, 96), (30, 30), (500, 480)])
def test_tiles_that_patches_do_not_fill(tmp_path: Path, size: tuple[int, int]) -> None:
    """SigLIP with 384 pixels and patches of 14: a convolution of stride 14 leaves the last 6 rows and columns."""
    sizes = tuple((height, width) for height in (30, 60) for width in (30, 60))
    inputs = InputSpec(3, 512, "anyres", 7, 1, 1, 30, "linear", tile_sizes=sizes, max_tile_area=2, tiles_alone=True)
    config = ONEVISION_CONFIG | {"size": {"height": 30, "width": 30}, "image_grid_pinpoints": [list(s) for s in sizes]}
    spec = read_image_spec(write(tmp_path, config), inputs)
    path, image = picture(tmp_path, size)
    theirs = LlavaOnevisionImageProcessorPil(**config)(images=[[image]], return_tensors="pt")["pixel_values"][0]
    weight = torch.randn(5, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.conv2d(theirs, weight, stride=7).flatten(2).transpose(1, 2).flatten(0, 1)
    grid = target_grid(spec, *size)
    assert torch.allclose(load_patches(path, spec) @ weight.flatten(1).T, expected, atol=1e-4)
    assert grid[:3] == (len(theirs), 4, 4)
