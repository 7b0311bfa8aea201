"""Images cut into square tiles of one size, and a thumbnail of the whole (InternVL's dynamic tiling).

Source: InternVL 1.5, arXiv 2404.16821, section 3.3; equal to transformers' GotOcr2 image processor.
"""

import functools


@functools.lru_cache(maxsize=4096)
def tile_arrangement(width_px: int, height_px: int, tile_px: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """(columns, rows) of tiles whose aspect ratio is nearest to the image's.

    Of equally near ones it is the first, or a larger one if the image fills more than half of its area.
    """
    arrangements = sorted(
        (
            (columns, rows)
            for columns in range(1, max_tiles + 1)
            for rows in range(1, max_tiles + 1)
            if min_tiles <= columns * rows <= max_tiles
        ),
        key=lambda one: one[0] * one[1],
    )
    best, least = (1, 1), float("inf")
    for columns, rows in arrangements:
        difference = abs(width_px / height_px - columns / rows)
        fills = width_px * height_px > 0.5 * tile_px**2 * columns * rows
        if difference < least or (difference == least and fills):
            best, least = (columns, rows), difference
    return best


def num_tiles(width_px: int, height_px: int, tile_px: int, min_tiles: int, max_tiles: int) -> int:
    """Tiles of an image, the thumbnail included where there is one: with more than one tile."""
    columns, rows = tile_arrangement(width_px, height_px, tile_px, min_tiles, max_tiles)
    return columns * rows + (1 if columns * rows > 1 else 0)
