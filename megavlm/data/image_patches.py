"""Frames of bytes to normalised patches, as transformers' image processors normalise: equal to the last bit.

Shape suffixes: P patches, C values of a flattened patch, HWC image axes.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch

from megavlm.data.image_spec import ImageSpec


def patches_of(
    frames: Sequence[np.ndarray], spec: ImageSpec, rows: int, columns: int, out_PC: torch.Tensor | None = None
) -> torch.Tensor:
    """Normalise frames and cut them into patches.

    Args:
        frames: uint8 [H, W, C] each, at least rows x columns patches large; what is beyond that is left out (of 384
            pixels SigLIP's convolution reads 27 x 14).
        spec: of the family.
        rows: patches of a frame.
        columns: likewise.
        out_PC: where to write, contiguous; None: somewhere new.

    Returns:
        float32 [P, C], frame by frame: `dynamic` patches in merge-block order, C = (colour, repeat, row, column)
        flattened; the others row by row, C = (colour, row, column).
    """
    patch, repeats = spec.patch_px, spec.temporal_patch_size
    merge = spec.merge_size if spec.kind == "dynamic" else 1
    shape = len(frames) * rows * columns, 3 * repeats * patch * patch
    out_PC = torch.empty(shape, dtype=torch.float32) if out_PC is None else out_PC
    assert out_PC.shape == shape and out_PC.is_contiguous() and out_PC.dtype == torch.float32
    out = out_PC.numpy().reshape(len(frames), rows * columns, 3, repeats, patch * patch)
    levels = _levels(spec.mean, spec.std, spec.rescale)
    for number, pixels_HWC in enumerate(frames):
        seen_HWC = pixels_HWC[: rows * patch, : columns * patch]
        blocks = seen_HWC.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
        # -> colour, block row, block column, row in block, column in block, patch row, patch column; while it is bytes
        ordered = np.ascontiguousarray(blocks.transpose(6, 0, 3, 1, 4, 2, 5)).reshape(3, rows * columns, patch * patch)
        for colour in range(3):
            out[number, :, colour] = np.take(levels[colour], ordered[colour])[:, None]
    return out_PC


@functools.lru_cache(maxsize=64)
def _levels(mean: tuple[float, ...], std: tuple[float, ...], rescale: float) -> np.ndarray:
    """What each of the 256 levels becomes, float32 [colour, level]: a table is faster than the arithmetic."""
    # float64 for the rescaling and float32 for the rest is what transformers does: equal to the last bit.
    scaled = (np.arange(256, dtype=np.float64) * rescale).astype(np.float32)
    mean_3, std_3 = np.array(mean, dtype=np.float32), np.array(std, dtype=np.float32)
    return (scaled - mean_3[:, None]) / std_3[:, None]
