"""The one definition of how each family's images become patches; PIL is the reference.

Equal, bit for bit, to what transformers' PIL image processors make of `transformers.image_utils.load_image(path)`:
the EXIF orientation is applied, then `convert("RGB")` (palettes are looked up, alpha is dropped, 16-bit greys
clip at 255), and of an animation the first frame is taken.

Shape suffixes: P patches, C values of a flattened patch, HWC / CHW image axes.
"""

import contextlib
import struct
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps, PngImagePlugin, UnidentifiedImageError

from megavlm.data.anyres import cut_anyres, padded_square
from megavlm.data.image_spec import ImageSpec, read_image_spec, target_grid
from megavlm.data.image_tiles import cut_tiles
from megavlm.data.media import media_name, open_media
from megavlm.data.sample import Media
from megavlm.errors import UseError, use_error

__all__ = ["ImageSpec", "load_patches", "read_image_size", "read_image_spec", "target_grid"]

# What PIL's decoders raise for broken files; MemoryError and bugs of our own are not among them.
_BROKEN_IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def read_image_size(path: Media) -> tuple[int, int]:
    """(width, height) in pixels as the image will be seen, from the file's header: nothing is decoded.

    Raises:
        UseError: the file is missing or no image.
    """
    try:
        with open_media(path) as file, Image.open(file) as image:
            width, height = image.size
            swapped = _header_orientation(image, file) >= 5
    except _BROKEN_IMAGE_ERRORS as error:
        raise _broken_image(path, error) from error
    return (height, width) if swapped else (width, height)


def _header_orientation(image: Image.Image, file: BinaryIO) -> int:
    """EXIF orientation (1 to 8; from 5 on width and height swap) that decoding will still apply."""
    if image.format == "TIFF":
        return 1  # PIL gives a TIFF's size with its orientation applied already.
    if isinstance(image, PngImagePlugin.PngImageFile) and not _png_has_late_metadata(file):
        # PngImageFile.getexif would decode the whole image to look behind the pixels.
        exif = Image.Image.getexif(image)
    else:
        exif = image.getexif()
    return int(exif.get(ExifTags.Base.Orientation, 1))


def _png_has_late_metadata(file: BinaryIO) -> bool:
    """Whether a PNG has EXIF or text chunks behind its pixels; reads chunk headers only."""
    before = file.tell()
    try:
        file.seek(8)
        seen_pixels = False
        while len(header := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            seen_pixels = seen_pixels or kind == b"IDAT"
            if seen_pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            file.seek(length + 4, 1)
        return False
    finally:
        file.seek(before)


def load_patches(path: Media, spec: ImageSpec, num_images: int = 1) -> torch.Tensor:
    """Decode one image into patches.

    Args:
        path: where the image is.
        spec: of the family.
        num_images: of its row.

    Returns:
        float32 [P, C]. `dynamic`: patches in merge-block order, C = (colour, frame, row, column) flattened.
        The others: patches row by row (tile by tile), C = (colour, row, column) flattened.

    Raises:
        UseError: the file is missing, truncated or no image, or its aspect ratio is beyond the limit.
    """
    image = load_rgb(path)
    try:
        _, rows, columns = target_grid(spec, *image.size, num_images)[:3]
    except UseError as error:
        raise UseError(f"{media_name(path)}: {error}") from error
    if spec.kind == "dynamic":
        size = (columns * spec.patch_px, rows * spec.patch_px)
        frames = [np.asarray(image.resize(size, resample=spec.resample))]
    elif spec.kind == "resized":
        frames = [np.asarray(image.resize((spec.image_px, spec.image_px), resample=spec.resample))]
    elif spec.kind == "tiles":
        frames = cut_tiles(image, spec.image_px, spec.min_tiles, spec.max_tiles, spec.resample)
    elif spec.kind == "anyres" and spec.has_tiles(num_images):
        frames = cut_anyres(image, spec.tile_sizes, spec.image_px, spec.resample)
    elif spec.kind == "anyres":
        red, green, blue = (int(value * 255) for value in spec.mean)
        frames = [padded_square(image, (red, green, blue), spec.image_px, spec.resample)]
    else:
        frames = [_resize_and_crop(image, spec)]
    return torch.cat([_to_patches(pixels_HWC, spec, rows, columns) for pixels_HWC in frames])


def load_rgb(path: Media) -> Image.Image:
    """Decode one image, turned as its EXIF orientation says.

    Raises:
        UseError: the file is missing, truncated or no image.
    """
    try:
        with _whole_files_only(), open_media(path) as file, Image.open(file) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except _BROKEN_IMAGE_ERRORS as error:
        raise _broken_image(path, error) from error


def _to_patches(pixels_HWC: np.ndarray, spec: ImageSpec, rows: int, columns: int) -> torch.Tensor:
    # Of 384 pixels SigLIP's convolution reads 27 x 14 and leaves the rest.
    seen_HWC = pixels_HWC[: rows * spec.patch_px, : columns * spec.patch_px]
    pixels_CHW = np.ascontiguousarray(_normalise(seen_HWC, spec).transpose(2, 0, 1))
    return _patchify(torch.from_numpy(pixels_CHW), spec, rows, columns)


@contextlib.contextmanager
def _whole_files_only() -> Iterator[None]:
    """PIL fills up what is missing where some library set this switch; such an image would be trained on."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _broken_image(path: Media, error: Exception) -> UseError:
    # PIL's own words name the file object with its address in memory.
    unknown = isinstance(error, UnidentifiedImageError)
    reason = "cannot identify image file" if unknown else str(error) or type(error).__name__
    return use_error(
        media_name(path), f"unreadable image ({reason})", "a complete image file", "replace it or drop the row"
    )


def _resize_and_crop(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    width, height = image.size
    longer = int(spec.resize_px * max(width, height) / min(width, height))
    size = (spec.resize_px, longer) if width <= height else (longer, spec.resize_px)
    top, left = (size[1] - spec.image_px) // 2, (size[0] - spec.image_px) // 2
    resized_HWC = np.asarray(image.resize(size, resample=spec.resample))
    return resized_HWC[top : top + spec.image_px, left : left + spec.image_px]


def _normalise(pixels_HWC: np.ndarray, spec: ImageSpec) -> np.ndarray:
    # float64 for the rescaling and float32 for the rest is what transformers does: equal to the last bit.
    scaled_HWC = (pixels_HWC.astype(np.float64) * spec.rescale).astype(np.float32)
    return (scaled_HWC - np.array(spec.mean, dtype=np.float32)) / np.array(spec.std, dtype=np.float32)


def _patchify(pixels_CHW: torch.Tensor, spec: ImageSpec, rows: int, columns: int) -> torch.Tensor:
    patch = spec.patch_px
    merge = spec.merge_size if spec.kind == "dynamic" else 1
    blocks = pixels_CHW.reshape(3, rows // merge, merge, patch, columns // merge, merge, patch)
    # -> block row, block column, row in block, column in block, colour, patch row, patch column
    blocks = blocks.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)
    blocks = blocks.expand(-1, -1, -1, -1, -1, spec.temporal_patch_size, -1, -1)
    return blocks.reshape(rows * columns, 3 * spec.temporal_patch_size * patch * patch)
