"""The pixels of an encoded sample's images and videos.

Shape suffixes: P patches, C values of a flattened patch.
"""

import torch

from megavlm.data.encode import SampleEncoder
from megavlm.data.images import load_patches
from megavlm.data.media import media_name
from megavlm.data.sample import EncodedSample, VideoClip
from megavlm.data.videos import load_video_patches
from megavlm.errors import UseError, use_error


def load_sample_patches(sample: EncodedSample, encoder: SampleEncoder) -> list[torch.Tensor]:
    """Decode all images and videos of a sample: float32 [P, C] each.

    Raises:
        UseError: as `load_image_patches`.
    """
    return [load_image_patches(sample, number, encoder) for number in range(len(sample.images))]


def load_image_patches(sample: EncodedSample, number: int, encoder: SampleEncoder) -> torch.Tensor:
    """Decode one image (or video) of a sample: float32 [P, C].

    Raises:
        UseError: naming the row, for an unreadable image, or one whose size changed since its header was read.
    """
    source, grid = sample.images[number], sample.grids_thw[number]
    path = source.path if isinstance(source, VideoClip) else source
    try:
        if isinstance(source, VideoClip):
            assert encoder.video_spec is not None
            patches_PC = load_video_patches(source, grid, encoder.video_spec)
        else:
            num_images = sum(not isinstance(image, VideoClip) for image in sample.images)
            patches_PC = load_patches(source, encoder.image_spec, num_images)
        expected = grid[0] * grid[1] * grid[2]
        if len(patches_PC) != expected:
            raise use_error(
                media_name(path),
                f"{len(patches_PC)} patches",
                f"{expected} by its header",
                "do not change images during a run",
            )
    except UseError as error:
        raise UseError(f"{sample.sample_id}: {error}") from error
    return patches_PC
