"""Frames of bytes to patches: put in order while they are bytes, normalised where they are encoded.

Normalised values equal those of transformers' processors to the last bit. They take eight times the memory of the bytes
of a still image that is repeated along time, so data workers and copies to a device only see bytes.

Shape suffixes: B bytes, P patches, C values of a flattened patch, HWC image axes.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megavlm.data.image_spec import ImageSpec

PART_BYTES = 64 * 1024
"""Bytes that are normalised at a time on a CPU."""


@dataclass(frozen=True)
class PatchFormat:
    """How the bytes of a patch become its values.

    Attributes:
        num_frames: frames in the bytes of a patch.
        repeats: how often a frame is repeated in the values; 1 where there are several.
        patch_px: side of a patch in pixels.
        mean: subtracted per colour (red, green, blue) after rescaling.
        std: divided by per colour.
        rescale: factor from 0..255 to 0..1.
        is_video: whether it is a video's: rounded as transformers' video processors do, not its image processors.
    """

    num_frames: int
    repeats: int
    patch_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale: float
    is_video: bool

    @property
    def patch_bytes(self) -> int:
        """Bytes of a patch: 3 colours x frames x rows x columns."""
        return 3 * self.num_frames * self.patch_px**2

    @property
    def patch_channels(self) -> int:
        """Values of a patch."""
        return self.patch_bytes * self.repeats


def patch_format(spec: ImageSpec, *, is_video: bool = False) -> PatchFormat:
    """The format of a family's images: of a still image one frame is kept; of a video (`spec` of its frames) all."""
    temporal = spec.temporal_patch_size
    frames = (temporal, 1) if is_video else (1, temporal)
    return PatchFormat(*frames, spec.patch_px, spec.mean, spec.std, spec.rescale, is_video)


@dataclass(frozen=True)
class PixelBytes:
    """Patches of some images and videos as bytes, in the order of their values; `normalised` makes those.

    Attributes:
        values_B: uint8, patch by patch: (colour, frame, row, column) flattened.
        runs: formats of the patches, each with the number of patches that follow one another in it.
        patch_channels: C, for no patches.
    """

    values_B: torch.Tensor
    runs: tuple[tuple[PatchFormat, int], ...]
    patch_channels: int

    def __getstate__(self) -> dict[str, Any]:
        """What is not in shared memory leaves a data worker as bytes: torch would put it there, and copy it."""
        values_B = self.values_B if self.values_B.is_shared() else self.values_B.numpy()
        return {**vars(self), "values_B": values_B}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Back to a tensor."""
        vars(self).update(state)
        if isinstance(state["values_B"], np.ndarray):
            vars(self)["values_B"] = torch.from_numpy(state["values_B"])

    @property
    def num_patches(self) -> int:
        """P."""
        return sum(number for _, number in self.runs)


def cut_patches(
    frames: Sequence[np.ndarray], spec: ImageSpec, patches: PatchFormat, rows: int, columns: int, out_B: torch.Tensor
) -> None:
    """Cut frames into patches.

    Args:
        frames: uint8 [H, W, C] each, at least rows x columns patches large; what is beyond that is left out (of 384
            pixels SigLIP's convolution reads 27 x 14).
        spec: of the family.
        patches: see `patch_format`; their frames divide `frames`.
        rows: patches of a frame.
        columns: likewise.
        out_B: where to write, uint8, contiguous: frame by frame (temporal patch by temporal patch); `dynamic` patches
            in merge-block order, the others row by row.
    """
    patch, together = spec.patch_px, patches.num_frames
    merge = spec.merge_size if spec.kind == "dynamic" else 1
    assert len(frames) % together == 0 and out_B.is_contiguous() and out_B.dtype == torch.uint8
    shape = len(frames) // together, rows // merge, columns // merge, merge, merge, 3, together, patch, patch
    out = out_B.numpy().reshape(shape)
    for number, pixels_HWC in enumerate(frames):
        seen_HWC = pixels_HWC[: rows * patch, : columns * patch]
        blocks = seen_HWC.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
        # -> block row, block column, row in block, column in block, colour, patch row, patch column
        out[number // together, ..., number % together, :, :] = blocks.transpose(0, 3, 1, 4, 6, 2, 5)


def normalised(pixels: PixelBytes, device: torch.device | str = "cpu") -> torch.Tensor:
    """The values of patches, on a device: float32 [P, C], C = (colour, frame, row, column) flattened.

    A still image is repeated along time where its family does so.
    """
    out_PC = torch.empty(pixels.num_patches, pixels.patch_channels, device=device)
    numbers = [number for _, number in pixels.runs]
    sizes = [patches.patch_bytes * number for patches, number in pixels.runs]
    # Bytes cross to the device; they are an eighth of the values (a quarter of a video's).
    values = pixels.values_B.to(device, non_blocking=True).split(sizes)
    for (patches, number), run_B, run_PC in zip(pixels.runs, values, out_PC.split(numbers), strict=True):
        levels, starts = _levels(patches, str(run_B.device))
        found, out = run_B.view(number, 3, -1), run_PC.view(number, 3, patches.repeats, -1)
        # A part of the patches after the other: what stands between bytes and values stays in a processor's cache.
        part = max(1, (PART_BYTES if run_B.device.type == "cpu" else run_B.numel()) // patches.patch_bytes)
        for found_part, out_part in zip(found.split(part), out.split(part), strict=True):
            chosen = levels.index_select(0, (found_part.int() + starts).view(-1))
            out_part.copy_(chosen.view(len(found_part), 3, 1, -1))
    return out_PC


@functools.lru_cache(maxsize=64)
def _levels(patches: PatchFormat, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What each of the 256 levels becomes, colour by colour: float32 [3 x 256], and where colours start: int32 [3, 1].

    A table is equal to the last bit whatever the device, and no slower than the arithmetic.
    """
    mean, std = torch.tensor(patches.mean), torch.tensor(patches.std)
    if patches.is_video:
        # Rescaling is folded into mean and deviation, as transformers does for videos: equal to the last bit.
        scaled = torch.arange(256).float()
        mean, std = mean * (1.0 / patches.rescale), std * (1.0 / patches.rescale)
    else:
        # float64 for the rescaling and float32 for the rest, as transformers does for images.
        scaled = (torch.arange(256).double() * patches.rescale).float()
    levels = (scaled - mean[:, None]) / std[:, None]
    return levels.view(-1).to(device), torch.arange(0, 3 * 256, 256, dtype=torch.int32, device=device)[:, None]
