"""Images of any size on tiles of one size: padded to the most fitting of some sizes, and cut (LLaVA-NeXT, OneVision).

Source: LLaVA-NeXT (https://llava-vl.github.io/blog/2024-01-30-llava-next), equal to transformers' image processors.
"""

import functools
import math

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


def fitted_size(width_px: int, height_px: int, canvas_width: int, canvas_height: int) -> tuple[int, int]:
    """(width, height) of an image that is resized until it fills one side of a canvas."""
    scale_width, scale_height = canvas_width / width_px, canvas_height / height_px
    if scale_width < scale_height:
        return canvas_width, min(math.ceil(height_px * scale_width), canvas_height)
    return min(math.ceil(width_px * scale_height), canvas_width), canvas_height
