"""Images of any size on tiles of one size: padded to the most fitting of some sizes, and cut (LLaVA-NeXT, OneVision).

Source: LLaVA-NeXT (https://llava-vl.github.io/blog/2024-01-30-llava-next), equal to transformers' image processors.

Shape suffixes: HWC image axes.
"""

import functools
import math

import numpy as np
from PIL import Image

from megavlm.config.inputs import Grid

Size = tuple[int, int]
"""(height, width) in pixels."""


@functools.lru_cache(maxsize=4096)
def best_size(width_px: int, height_px: int, sizes: tuple[Size, ...]) -> Size:
    """The size on which most of the image's pixels are kept; of equal ones that which wastes least."""
    best, most, least_wasted = sizes[0], 0, math.inf
    for height, width in sizes:
        scale = min(width / width_px, height / height_px)
        kept = min(int(width_px * scale) * int(height_px * scale), width_px * height_px)
        wasted = width * height - kept
        if kept > most or (kept == most and wasted < least_wasted):
            best, most, least_wasted = (height, width), kept, wasted
    return best


def anyres_grid(width_px: int, height_px: int, sizes: tuple[Size, ...], tile_px: int, side: int) -> Grid:
    """The grid of an image on tiles.

    Args:
        width_px: of the image.
        height_px: of the image.
        sizes: to choose from.
        tile_px: side of a tile in pixels.
        side: of a tile in patches.
    """
    height, width = best_size(width_px, height_px, sizes)
    tile_rows, tile_columns = height // tile_px, width // tile_px
    rows, columns = tile_rows * side, tile_columns * side
    if width_px / height_px > columns / rows:
        rows -= (rows - int(round(height_px * (columns / width_px), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width_px * (rows / height_px), 7))) // 2 * 2
    return 1 + tile_rows * tile_columns, side, side, tile_columns, rows, columns


def cut_anyres(image: Image.Image, sizes: tuple[Size, ...], tile_px: int, resample: int) -> list[np.ndarray]:
    """The whole image as a square, then its tiles row by row: uint8 [H, W, C] each."""
    height, width = best_size(*image.size, sizes)
    scale_width, scale_height = width / image.width, height / image.height
    if scale_width < scale_height:
        fitted = width, min(math.ceil(image.height * scale_width), height)
    else:
        fitted = min(math.ceil(image.width * scale_height), width), height
    padded_HWC = np.zeros((height, width, 3), dtype=np.uint8)
    left, top = (width - fitted[0]) // 2, (height - fitted[1]) // 2
    padded_HWC[top : top + fitted[1], left : left + fitted[0]] = np.asarray(image.resize(fitted, resample=resample))
    bands = np.split(padded_HWC, height // tile_px)
    tiles = [tile for band in bands for tile in np.split(band, width // tile_px, axis=1)]
    return [np.asarray(image.resize((tile_px, tile_px), resample=resample)), *tiles]


def padded_square(image: Image.Image, colour: tuple[int, int, int], tile_px: int, resample: int) -> np.ndarray:
    """The image in the middle of a square of a colour, as a tile: uint8 [H, W, C]."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((tile_px, tile_px), resample=resample))
