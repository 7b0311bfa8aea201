"""How an image of some size is laid out: what it is resized to, and which pieces of that become frames.

One plan for every backend: whoever decodes and resizes (PIL, DALI), the numbers come from here.

Shape suffixes: HWC image axes.
"""

from dataclasses import dataclass

import numpy as np

from megavlm.data.anyres import best_size, fitted_size
from megavlm.data.image_spec import ImageSpec
from megavlm.data.image_tiles import tile_arrangement


@dataclass(frozen=True)
class View:
    """One resized copy of an image, laid on a canvas that is cut into frames row by row.

    Attributes:
        size: (width, height) that the image is resized to.
        canvas: (width, height) of what is cut.
        offset: (left, top) of the resized image on the canvas; negative where it is cropped to it.
        tile: (width, height) of a frame.
        square: colour (red, green, blue) with which the image is padded to a square before it is resized; None: it
            is not.
    """

    size: tuple[int, int]
    canvas: tuple[int, int]
    offset: tuple[int, int]
    tile: tuple[int, int]
    square: tuple[int, int, int] | None = None


def _whole(size: tuple[int, int], square: tuple[int, int, int] | None = None) -> View:
    return View(size, size, (0, 0), size, square)


def image_views(
    spec: ImageSpec, width_px: int, height_px: int, rows: int, columns: int, num_images: int = 1
) -> tuple[View, ...]:
    """The views of an image, in the order of its frames.

    Args:
        spec: of the family.
        width_px: of the image as it is seen.
        height_px: of the image as it is seen.
        rows: patches of a frame (from `target_grid`).
        columns: likewise.
        num_images: of its row.
    """
    side = spec.image_px
    tile = (side, side)
    if spec.kind == "dynamic":
        return (_whole((columns * spec.patch_px, rows * spec.patch_px)),)
    if spec.kind == "resized":
        return (_whole(tile),)
    if spec.kind == "tiles":
        tile_columns, tile_rows = tile_arrangement(width_px, height_px, side, spec.min_tiles, spec.max_tiles)
        size = tile_columns * side, tile_rows * side
        tiles = View(size, size, (0, 0), tile)
        return (tiles, _whole(tile)) if tile_columns * tile_rows > 1 else (tiles,)
    if spec.kind == "anyres" and spec.has_tiles(num_images):
        canvas_height, canvas_width = best_size(width_px, height_px, spec.tile_sizes)
        fitted = fitted_size(width_px, height_px, canvas_width, canvas_height)
        offset = (canvas_width - fitted[0]) // 2, (canvas_height - fitted[1]) // 2
        return _whole(tile), View(fitted, (canvas_width, canvas_height), offset, tile)
    if spec.kind == "anyres":
        red, green, blue = (int(value * 255) for value in spec.mean)
        return (_whole(tile, (red, green, blue)),)
    longer = int(spec.resize_px * max(width_px, height_px) / min(width_px, height_px))
    size = (spec.resize_px, longer) if width_px <= height_px else (longer, spec.resize_px)
    return (View(size, tile, (-((size[0] - side) // 2), -((size[1] - side) // 2)), tile),)


def cut_frames(view: View, resized_HWC: np.ndarray) -> list[np.ndarray]:
    """The frames of a view: uint8 [H, W, C] each.

    Args:
        view: what the image was resized for.
        resized_HWC: uint8, of `view.size`.
    """
    assert resized_HWC.shape[:2] == view.size[::-1], (resized_HWC.shape, view.size)
    left, top = view.offset
    if view.size[0] >= view.canvas[0] and view.size[1] >= view.canvas[1]:
        canvas_HWC = resized_HWC[-top : view.canvas[1] - top, -left : view.canvas[0] - left]
    else:
        canvas_HWC = np.zeros((view.canvas[1], view.canvas[0], 3), dtype=np.uint8)
        canvas_HWC[top : top + view.size[1], left : left + view.size[0]] = resized_HWC
    if view.tile == view.canvas:
        return [canvas_HWC]
    bands = np.split(canvas_HWC, view.canvas[1] // view.tile[1])
    return [tile for band in bands for tile in np.split(band, view.canvas[0] // view.tile[0], axis=1)]
