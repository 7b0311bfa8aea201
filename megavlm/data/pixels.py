"""The pixels of an encoded sample's images and videos.

Shape suffixes: P patches, C values of a flattened patch.
"""

import torch

from megavlm.data.augment import Draw
from megavlm.data.encode import SampleEncoder
from megavlm.data.images import load_patches
from megavlm.data.sample import EncodedSample, VideoClip
from megavlm.data.videos import load_video_patches
from megavlm.errors import UseError


def load_sample_patches(sample: EncodedSample, encoder: SampleEncoder) -> list[torch.Tensor]:
    """Decode all images and videos of a sample: float32 [P, C] each.

    Raises:
        UseError: as `load_image_patches`.
    """
    return [load_image_patches(sample, number, encoder) for number in range(len(sample.images))]


def load_image_patches(
    sample: EncodedSample,
    number: int,
    encoder: SampleEncoder,
    *,
    draw: Draw | None = None,
    left_to_pil: list[str] | None = None,
    out_PC: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decode one image (or video) of a sample: float32 [P, C].

    Args:
        sample: the row.
        number: of the image in it.
        encoder: of the model.
        draw: how an image is augmented; videos are not.
        left_to_pil: see `images.load_patches`.
        out_PC: where to write, of the grid's size; None: somewhere new.

    Raises:
        UseError: naming the row, for an unreadable image, or one whose size changed since its header was read.
    """
    source, grid = sample.images[number], sample.grids_thw[number]
    if out_PC is None:
        out_PC = torch.empty(grid[0] * grid[1] * grid[2], encoder.inputs.patch_channels)
    try:
        if isinstance(source, VideoClip):
            assert encoder.video_spec is not None
            return out_PC.copy_(load_video_patches(source, grid, encoder.video_spec))
        return load_patches(
            source,
            encoder.image_spec,
            sample.num_images_together,
            encoder.loading,
            draw=draw,
            left_to_pil=left_to_pil,
            out_PC=out_PC,
        )
    except UseError as error:
        raise UseError(f"{sample.sample_id}: {error}") from error
