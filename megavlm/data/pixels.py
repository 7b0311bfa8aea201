"""The pixels of encoded samples' images and videos.

Shape suffixes: B bytes, P patches, C values of a flattened patch.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megavlm.data.augment import Draw
from megavlm.data.encode import SampleEncoder
from megavlm.data.image_patches import PatchFormat, PixelBytes, cut_patches, normalised, patch_format
from megavlm.data.image_request import ImageRequest
from megavlm.data.images import load_frames
from megavlm.data.sample import EncodedSample, Media, VideoClip
from megavlm.data.videos import load_video_bytes
from megavlm.errors import UseError


@dataclass(frozen=True)
class WantedImage:
    """An image (or video) to be decoded.

    Attributes:
        sample: the row.
        number: of the image in it.
        draw: how it is augmented; videos are not.
    """

    sample: EncodedSample
    number: int
    draw: Draw | None = None


def load_sample_patches(sample: EncodedSample, encoder: SampleEncoder) -> list[torch.Tensor]:
    """Decode all images and videos of a sample: float32 [P, C] each.

    Raises:
        UseError: as `load_pixels`.
    """
    return [load_image_patches(sample, number, encoder) for number in range(len(sample.images))]


def load_image_patches(sample: EncodedSample, number: int, encoder: SampleEncoder) -> torch.Tensor:
    """Decode one image (or video) of a sample: float32 [P, C].

    Raises:
        UseError: as `load_pixels`.
    """
    return normalised(load_pixels([WantedImage(sample, number)], encoder))


def load_pixels(
    wanted: Sequence[WantedImage],
    encoder: SampleEncoder,
    *,
    left_to_pil: list[str] | None = None,
    empty: Callable[[int], torch.Tensor] = lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8),
) -> PixelBytes:
    """Decode images and videos, each written where it stays.

    Args:
        wanted: which, in order.
        encoder: of the model.
        left_to_pil: see `images.load_patches`.
        empty: gives memory for so many bytes, uint8 [B].

    Raises:
        UseError: naming the row, for an unreadable image, or one whose size changed since its header was read.
    """
    formats = [_format_of(image, encoder) for image in wanted]
    numbers = [math.prod(image.sample.grids_thw[image.number][:3]) for image in wanted]
    sizes = [patches.patch_bytes * number for patches, number in zip(formats, numbers, strict=True)]
    values_B = empty(sum(sizes))
    stills = [_request(image) for image in wanted if not isinstance(_source(image), VideoClip)]
    frames = load_frames(stills, encoder.image_spec, encoder.loading, left_to_pil)
    for image, patches, out_B in zip(wanted, formats, values_B.split(sizes), strict=True):
        if isinstance(_source(image), VideoClip):
            _load_video(image, encoder, out_B)
        else:
            pixels, (_, rows, columns, *_) = next(frames)
            cut_patches(pixels, encoder.image_spec, patches, rows, columns, out_B)
    alike = itertools.groupby(zip(formats, numbers, strict=True), key=lambda run: run[0])
    runs = tuple((patches, sum(number for _, number in group)) for patches, group in alike)
    return PixelBytes(values_B, runs, encoder.inputs.patch_channels)


def _source(image: WantedImage) -> Media | VideoClip:
    return image.sample.images[image.number]


def _request(image: WantedImage) -> ImageRequest:
    sample, source = image.sample, _source(image)
    assert not isinstance(source, VideoClip)
    grid = sample.grids_thw[image.number]
    return ImageRequest(source, sample.num_images_together, grid, image.draw, sample.sample_id)


def _format_of(image: WantedImage, encoder: SampleEncoder) -> PatchFormat:
    if not isinstance(_source(image), VideoClip):
        return patch_format(encoder.image_spec)
    assert encoder.video_spec is not None
    return patch_format(encoder.video_spec.frame, is_video=True)


def _load_video(image: WantedImage, encoder: SampleEncoder, out_B: torch.Tensor) -> None:
    sample, source = image.sample, _source(image)
    assert isinstance(source, VideoClip) and encoder.video_spec is not None
    try:
        load_video_bytes(source, sample.grids_thw[image.number], encoder.video_spec, out_B)
    except UseError as error:
        raise UseError(f"{sample.sample_id}: {error}") from error
