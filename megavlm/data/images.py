"""The one definition of how each family's images become patches; PIL is the reference.

Equal, bit for bit, to what transformers' PIL image processors make of `transformers.image_utils.load_image(path)`: the
EXIF orientation is applied, then `convert("RGB")`. So, on purpose:

- Palettes are looked up; a transparent entry shows its colour. Alpha (RGBA, LA) is dropped, not blended.
- Greys and 1-bit images are repeated in all three colours. CMYK and YCbCr are converted without colour profiles.
- 16-bit greys clip at 255 (bring such images to 8 bits beforehand); of 16-bit colours the upper byte is kept.
- Of an animation (GIF, WebP, APNG) and of a TIFF of several pages the first frame is taken.
- A truncated file is refused, not filled up. So is an image of more pixels than PIL's limit, of which PIL only warns
  (`data.max_image_pixels`).
- `dynamic` families refuse sides that differ by more than a factor of 200, those that pad to a square very long sides
  (`MAX_PADDED_PX`); the others resize whatever there is.

With another backend (`ImageLoading`) decoding and resizing are done elsewhere; geometry and normalisation are the same.

Shape suffixes: B bytes, P patches, C values of a flattened patch; HWC image axes.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps

from megavlm.config.inputs import Grid
from megavlm.data.augment import Draw, augmented
from megavlm.data.image_files import (
    BROKEN_IMAGE_ERRORS,
    broken_image,
    header_orientation,
    opened,
    read_image_size,
    seen_size,
)
from megavlm.data.image_loading import BY_PIL, ImageLoading
from megavlm.data.image_patches import PixelBytes, cut_patches, normalised, patch_format
from megavlm.data.image_request import ImageRequest
from megavlm.data.image_spec import ImageSpec, read_image_spec, target_grid
from megavlm.data.image_views import View, cut_frames
from megavlm.data.sample import Media

__all__ = ["ImageSpec", "load_frames", "load_patches", "load_rgb", "read_image_size", "read_image_spec", "target_grid"]


def load_patches(
    path: Media,
    spec: ImageSpec,
    num_images: int = 1,
    loading: ImageLoading = BY_PIL,
    *,
    draw: Draw | None = None,
    left_to_pil: list[str] | None = None,
) -> torch.Tensor:
    """Decode one image into normalised patches.

    Args:
        path: where the image is.
        spec: of the family.
        num_images: of its row.
        loading: who decodes and resizes.
        draw: how the image is augmented; the grid is that of the whole image.
        left_to_pil: an entry is appended if DALI was to decode the image and left it to PIL: its kind.

    Returns:
        float32 [P, C]. `dynamic`: patches in merge-block order, C = (colour, frame, row, column) flattened.
        The others: patches row by row (tile by tile), C = (colour, row, column) flattened.

    Raises:
        UseError: the file is missing, truncated or no image, has too many pixels, or its aspect ratio is beyond the
            limit.
    """
    ((frames, grid),) = load_frames([ImageRequest(path, num_images, draw=draw)], spec, loading, left_to_pil)
    patches, num_patches = patch_format(spec), math.prod(grid[:3])
    values_B = torch.empty(num_patches * patches.patch_bytes, dtype=torch.uint8)
    cut_patches(frames, spec, patches, grid[1], grid[2], values_B)
    return normalised(PixelBytes(values_B, ((patches, num_patches),), patches.patch_channels))


def load_frames(
    requests: Sequence[ImageRequest],
    spec: ImageSpec,
    loading: ImageLoading = BY_PIL,
    left_to_pil: list[str] | None = None,
) -> Iterator[tuple[list[np.ndarray], Grid]]:
    """Decode images one after the other (DALI takes several together): the frames (tiles) of each, and its grid.

    Args:
        requests: the images.
        spec: of the family.
        loading: who decodes and resizes.
        left_to_pil: as in `load_patches`.

    Yields:
        uint8 [H, W, C] each, and (time, rows, columns) of patches.

    Raises:
        UseError: as `load_patches`; or an image is not what it was when its row was looked at.
    """
    if loading.backend == "pil":
        for request in requests:
            yield _by_pil(request, spec, loading)
        return
    from megavlm.data.images_by_dali import frames_by_dali

    for request, found in zip(requests, frames_by_dali(requests, spec, loading), strict=True):
        if not isinstance(found, str):
            yield found
            continue
        if left_to_pil is not None:
            left_to_pil.append(found)
        yield _by_pil(request, spec, loading)


def _by_pil(request: ImageRequest, spec: ImageSpec, loading: ImageLoading) -> tuple[list[np.ndarray], Grid]:
    with request.named(), opened(request.path) as (file, image):
        orientation = header_orientation(image, file)
        grid, views = request.layout(spec, seen_size(image, orientation))
        if loading.jpeg_draft:
            _draft(image, orientation, views, request.draw)
        ImageOps.exif_transpose(image, in_place=True)
        shown = image if image.mode == "RGB" else image.convert("RGB")
        shown = shown if request.draw is None else augmented(shown, request.draw)
    return [frame for view in views for frame in cut_frames(view, _resized(shown, view, spec.resample))], grid


def load_rgb(path: Media) -> Image.Image:
    """Decode one image, turned as its EXIF orientation says.

    Raises:
        UseError: the file is missing, truncated or no image.
    """
    try:
        with opened(path) as (_file, image):
            return ImageOps.exif_transpose(image).convert("RGB")
    except BROKEN_IMAGE_ERRORS as error:
        raise broken_image(path, error) from error


def _draft(image: Image.Image, orientation: int, views: Sequence[View], draw: Draw | None) -> None:
    """Tell PIL's JPEG decoder how small the image may become; it takes a half, a quarter or an eighth, or none."""
    width, height = seen_size(image, orientation)
    scale = 0.0
    for view in views:
        shown = (width, height) if view.square is None else (max(width, height),) * 2
        scale = max(scale, view.size[0] / shown[0], view.size[1] / shown[1])
    scale /= 1.0 if draw is None else draw.side
    image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))


def _resized(image: Image.Image, view: View, resample: int) -> np.ndarray:
    if view.square is not None:
        side = max(image.size)
        square = Image.new("RGB", (side, side), view.square)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    return np.asarray(image.resize(view.size, resample=resample))
