"""Patches of odd images against transformers' own image processors, family by family; and what both refuse."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from megavlm.config.inputs import InputSpec
from megavlm.data.images import load_patches, read_image_size, read_image_spec, target_grid
from megavlm.errors import UseError
from tests.evidence import record, row
from tests.pictures import write_broken, write_pictures

# Qwen's own mean and deviation; those of the others are their own, too.
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
SQUARE = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}, **CLIP}
TILE_SIZES = tuple((height, width) for height in (56, 112, 168) for width in (56, 112, 168))
PINPOINTS = {"image_grid_pinpoints": [list(size) for size in TILE_SIZES]}


@dataclass(frozen=True)
class Family:
    """A kind of images with a small tower, and transformers' processor for it; some are given extra arguments."""

    inputs: InputSpec
    config: dict[str, Any]
    processor: Callable[..., Any]
    arguments: dict[str, Any]
    num_images: int = 1


def _inputs(kind: str, patch_px: int, image_px: int, **changes: Any) -> InputSpec:
    values = {"temporal_patch_size": 1, "merge_size": 1, "position_kind": "linear"} | changes
    return InputSpec(3, 512, kind, patch_px, image_px=image_px, **values)


FAMILIES = {
    "qwen2_5_vl": Family(
        _inputs("dynamic", 14, 0, temporal_patch_size=2, merge_size=2),
        {"patch_size": 14, "size": {"shortest_edge": 56 * 56, "longest_edge": 448 * 448}, **CLIP},
        Qwen2VLImageProcessorPil,
        {},
    ),
    "qwen3_vl": Family(
        _inputs("dynamic", 16, 0, temporal_patch_size=2, merge_size=2),
        {"patch_size": 16, "size": {"shortest_edge": 64 * 64, "longest_edge": 448 * 448}, **HALF},
        Qwen2VLImageProcessorPil,
        {},
    ),
    "llava": Family(_inputs("square", 14, 56), SQUARE, CLIPImageProcessorPil, {}),
    "siglip": Family(
        _inputs("resized", 14, 60), {"size": {"height": 60, "width": 60}, **HALF}, SiglipImageProcessorPil, {}
    ),
    "internvl": Family(
        _inputs("tiles", 14, 56, merge_size=2),
        {"size": {"height": 56, "width": 56}, "max_patches": 12, **CLIP},
        GotOcr2ImageProcessorPil,
        {"crop_to_patches": True},
    ),
    "llava_next": Family(
        _inputs("anyres", 14, 56, tile_sizes=TILE_SIZES), SQUARE | PINPOINTS, LlavaNextImageProcessorPil, {}
    ),
    "llava_onevision": Family(
        _inputs("anyres", 14, 56, tile_sizes=TILE_SIZES, max_tile_area=9, tiles_alone=True),
        {"size": {"height": 56, "width": 56}, **HALF, **PINPOINTS},
        LlavaOnevisionImageProcessorPil,
        {},
    ),
    "llava_onevision, two images": Family(
        _inputs("anyres", 14, 56, tile_sizes=TILE_SIZES, max_tile_area=9, tiles_alone=True),
        {"size": {"height": 56, "width": 56}, **CLIP, **PINPOINTS},
        LlavaOnevisionImageProcessorPil,
        {},
        num_images=2,
    ),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def theirs(family: Family, path: Path) -> torch.Tensor:
    """What the tower's patch embedding gets from transformers: [P, C]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of palettes with transparency, of large images
        image = load_image(str(path))
    images: list[Any] = [image] if family.num_images == 1 else [[image] * family.num_images]
    out = family.processor(**family.config)(images=images, return_tensors="pt", **family.arguments)
    if family.inputs.image_kind == "dynamic":
        return out["pixel_values"]
    tiles = out["pixel_values"]
    tiles = tiles[0] if tiles.ndim == 5 else tiles
    patch = family.inputs.patch_px
    patches = torch.nn.functional.unfold(tiles, patch, stride=patch).transpose(1, 2)
    return patches.reshape(-1, patches.shape[-1])


@pytest.mark.parametrize("name", FAMILIES)
def test_patches_of_odd_images(name: str, pictures: list[Path], tmp_path: Path) -> None:
    family = FAMILIES[name]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(family.config))
    spec = read_image_spec(tmp_path, family.inputs)
    largest, refused = 0.0, []
    for path in pictures:
        size = read_image_size(path)
        try:
            ours = load_patches(path, spec, family.num_images)
        except UseError as error:
            assert "\n" not in str(error) and f"{path.name}: image size: got {size[0]} x {size[1]}" in str(error)
            if family.inputs.image_kind == "dynamic":
                with pytest.raises(ValueError, match="aspect ratio"):
                    theirs(family, path)
            refused.append(size)
            continue
        frames, rows, columns = target_grid(spec, *size, family.num_images)[:3]
        expected = theirs(family, path)
        assert ours.shape == expected.shape == (frames * rows * columns, family.inputs.patch_channels), path.name
        largest = max(largest, float((ours - expected).abs().max()))
        assert torch.equal(ours, expected), path.name
    # Qwen's processor refuses sides that differ by more than a factor of 200; OneVision's would pad to 1.2 GB.
    if family.inputs.image_kind == "dynamic":
        assert len(refused) == 5 and all(max(size) > 200 * min(size) for size in refused)
    else:
        assert len(refused) == (3 if family.num_images > 1 else 0) and all(max(size) == 20000 for size in refused)
    record(
        "data",
        [
            row(
                f"Pixels, {name}: {len(pictures) - len(refused)} odd images, {len(refused)} refused",
                largest,
                unit="largest difference of a normalised pixel",
                required="= 0",
                reference="transformers' PIL image processor",
                command="make test TESTS=tests/parity",
            )
        ],
    )


def test_broken_files_are_refused_by_both(tmp_path: Path) -> None:
    config = tmp_path / "model"
    config.mkdir()
    (config / "preprocessor_config.json").write_text(json.dumps(SQUARE))
    spec = read_image_spec(config, FAMILIES["llava"].inputs)
    paths = write_broken(tmp_path)
    assert len(paths) == 28
    for path in paths:
        with path.open("rb") as file, pytest.raises((OSError, ValueError, SyntaxError)):
            load_image(Image.open(file))
        with pytest.raises(UseError, match="unreadable image") as caught:
            load_patches(path, spec)
        assert "\n" not in str(caught.value) and path.name in str(caught.value)
