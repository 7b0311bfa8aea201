"""Lengths from a CSV file, for models whose images are tiles that are joined."""

from pathlib import Path

import pytest

from megavlm.config.inputs import InputSpec
from megavlm.errors import UseError
from megavlm.planner.workload import read_lengths

NEXT = InputSpec(
    image_token_id=5,
    vocab_size=100,
    image_kind="anyres",
    patch_px=14,
    temporal_patch_size=1,
    merge_size=1,
    image_px=336,
    position_kind="linear",
    tile_sizes=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
)
SIDE = 24


def lengths(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "lengths.csv"
    file.write_text(text)
    return file


def test_tiles_become_images_as_large_as_they_can_be(tmp_path: Path) -> None:
    # 300 text tokens beside 8 tiles of 256: an image of 2 x 2 and the whole, one of 1 x 2 and the whole
    (sample,) = read_lengths(lengths(tmp_path, f"num_tokens,num_tiles\n{300 + 8 * 256},8\n"), NEXT)
    square, wide = (5, SIDE, SIDE, 2, 48, 48), (3, SIDE, SIDE, 2, 24, 48)
    assert sample.grids == (square, wide)
    assert sample.num_tokens == 300 + (SIDE**2 + 48 * 49) + (SIDE**2 + 24 * 49)


def test_a_tile_alone_is_an_image_without_tiles(tmp_path: Path) -> None:
    one, none = read_lengths(lengths(tmp_path, "num_tokens,num_tiles\n300,1\n20,0\n"), NEXT)
    assert one.grids == ((1, SIDE, SIDE, 0, 0, 0),) and one.num_tokens == 44 + SIDE**2 + 1
    assert none.grids == () and none.num_tokens == 20


def test_grids_of_six_numbers(tmp_path: Path) -> None:
    (sample,) = read_lengths(lengths(tmp_path, "num_tokens,grids\n5000,5x24x24x2x48x40 1x24x24x0x0x0\n"), NEXT)
    assert sample.grids == ((5, 24, 24, 2, 48, 40), (1, 24, 24, 0, 0, 0))


def test_grids_of_three_numbers_are_another_models(tmp_path: Path) -> None:
    with pytest.raises(UseError, match=r"line 2: got grid 1x24x24: 3 numbers, the model's have 6"):
        read_lengths(lengths(tmp_path, "num_tokens,grids\n500,1x24x24\n"), NEXT)
