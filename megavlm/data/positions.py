"""Token positions of one sample, before packing.

Shape suffixes: S tokens of the sample, 3 the (temporal, height, width) axes.
"""

from collections.abc import Sequence

import numpy as np

from megavlm.config.inputs import Grid, InputSpec
from megavlm.data.sample import Media, VideoClip


def sample_positions(
    tokens_S: np.ndarray, images: Sequence[Media | VideoClip], grids_thw: Sequence[Grid], inputs: InputSpec
) -> np.ndarray:
    """Positions of a conversation as its family counts them: int64 [3, S].

    Args:
        tokens_S: token ids, image placeholders expanded.
        images: images and videos, in the order in which they stand there.
        grids_thw: of each.
        inputs: the family's facts.
    """
    if inputs.position_kind == "linear":
        return linear_positions(len(tokens_S))
    grids: list[Grid] = []
    intervals: list[float] = []
    for image, grid in zip(images, grids_thw, strict=True):
        if not isinstance(image, VideoClip):
            grids.append(grid)
            intervals.append(1.0)
            continue
        # The visual tokens of a frame whose time is written in front of them stand on their own.
        placed = [(1, *grid[1:])] * grid[0] if inputs.video_kind == "stamped" else [grid]
        grids += placed
        intervals += [image.interval] * len(placed)
    return mrope_positions(tokens_S, inputs.image_token_id, grids, inputs.merge_size, intervals)


def linear_positions(num_tokens: int) -> np.ndarray:
    """Positions that count tokens: int64 [3, S], three equal rows."""
    return np.tile(np.arange(num_tokens, dtype=np.int64), (3, 1))


def mrope_positions(
    tokens_S: np.ndarray,
    image_token_id: int,
    grids_thw: Sequence[Grid],
    merge_size: int,
    intervals: Sequence[float] | None = None,
) -> np.ndarray:
    """Multimodal rotary positions (Qwen2-VL, arXiv 2409.12191), equal to transformers' `get_rope_index`.

    Text counts on along all three axes. An image's tokens all start from the position p that is due: token
    (frame, row, column) of the merged grid gets (p + frame, p + row, p + column), and the text behind the image goes
    on from p + the longer side of the merged grid. Frames of a video lie further apart (Qwen2.5-VL): frame f gets
    p + floor(f x interval).

    Args:
        tokens_S: token ids, image placeholders expanded.
        image_token_id: id of the placeholder.
        grids_thw: patch grid (frames, rows, columns) of each image, in order.
        merge_size: patches per token along rows and columns.
        intervals: of each image; None: 1.

    Returns:
        int64 [3, S].
    """
    num_tokens = len(tokens_S)
    positions_3S = np.empty((3, num_tokens), dtype=np.int64)
    image_indices = np.flatnonzero(tokens_S == image_token_id)
    index, position, num_image_tokens = 0, 0, 0
    for number, (frames, patch_rows, patch_columns) in enumerate(grids_thw):
        rows, columns = patch_rows // merge_size, patch_columns // merge_size
        start, count = int(image_indices[num_image_tokens]), frames * rows * columns
        assert (tokens_S[start : start + count] == image_token_id).all(), "an image's tokens must be contiguous"
        positions_3S[:, index:start] = np.arange(position, position + start - index)
        position += start - index
        within_3S = np.indices((frames, rows, columns)).reshape(3, count)
        if intervals is not None:  # in float32, as torch multiplies
            within_3S[0] = (within_3S[0] * np.float32(intervals[number])).astype(np.int64)
        positions_3S[:, start : start + count] = position + within_3S
        position += max(rows, columns)
        index = start + count
        num_image_tokens += count
    assert num_image_tokens == len(image_indices), "more image tokens than the grids account for"
    positions_3S[:, index:] = np.arange(position, position + num_tokens - index)
    return positions_3S
