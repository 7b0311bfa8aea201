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

Shape suffixes: B bytes, P patches, C values of a flattened patch.
"""

import contextlib
import math
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps, PngImagePlugin, UnidentifiedImageError

from megavlm.config.inputs import Grid
from megavlm.config.schema import DataConfig
from megavlm.data.augment import Draw, augmented
from megavlm.data.image_loading import BY_PIL, ImageLoading
from megavlm.data.image_patches import PixelBytes, cut_patches, normalised, patch_format
from megavlm.data.image_spec import ImageSpec, read_image_spec, target_grid
from megavlm.data.image_views import View, cut_frames, image_views
from megavlm.data.media import media_name, open_media
from megavlm.data.sample import Media
from megavlm.errors import UseError, use_error

__all__ = ["ImageSpec", "load_bytes", "load_patches", "read_image_size", "read_image_spec", "target_grid"]

# What PIL's decoders raise for broken files; MemoryError and bugs of our own are not among them.
_BROKEN_IMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP")
"""What rows may show. PIL knows more: EPS would have Ghostscript run a program out of the file."""


def read_image_size(path: Media, max_pixels: int = DataConfig.max_image_pixels) -> tuple[int, int]:
    """(width, height) in pixels as the image will be seen, from the file's header: nothing is decoded.

    Args:
        path: where the image is.
        max_pixels: largest image. The default is where PIL begins to warn; at twice as much PIL refuses to open it.

    Raises:
        UseError: the file is missing or no image, or has too many pixels.
    """
    try:
        with _opened(path) as (file, image):
            width_px, height_px = _seen_size(image, _header_orientation(image, file))
    except _BROKEN_IMAGE_ERRORS as error:
        raise _broken_image(path, error) from error
    if width_px * height_px > max_pixels:
        raise use_error(
            media_name(path),
            f"an image of {width_px}x{height_px} pixels",
            f"at most data.max_image_pixels {max_pixels:,} of them",
            "shrink the image, or raise data.max_image_pixels",
        )
    return width_px, height_px


@contextlib.contextmanager
def _opened(path: Media) -> Iterator[tuple[BinaryIO, Image.Image]]:
    """The file and PIL's view of it, nothing decoded yet; strict while it is open."""
    # PIL fills up what is missing where some library set this switch; such an image would be trained on.
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            # Sizes were looked at when rows were encoded (`read_image_size`), against the recipe's own limit.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # Palettes with transparency: said once an image, of what is meant to be (see above).
            warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)
            with open_media(path) as file, Image.open(file, formats=FORMATS) as image:
                yield file, image
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _seen_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if orientation >= 5 else (width, height)


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
    frames, grid = _load_frames(path, spec, num_images, loading, draw, left_to_pil)
    patches, num_patches = patch_format(spec), math.prod(grid[:3])
    values_B = torch.empty(num_patches * patches.patch_bytes, dtype=torch.uint8)
    cut_patches(frames, spec, patches, grid[1], grid[2], values_B)
    return normalised(PixelBytes(values_B, ((patches, num_patches),), patches.patch_channels))


def load_bytes(
    path: Media,
    spec: ImageSpec,
    num_images: int,
    loading: ImageLoading,
    grid: Grid,
    out_B: torch.Tensor,
    *,
    draw: Draw | None = None,
    left_to_pil: list[str] | None = None,
) -> None:
    """Decode one image into patches of bytes (see `image_patches`).

    Args:
        path: where the image is.
        spec: of the family.
        num_images: of its row.
        loading: who decodes and resizes.
        grid: of the image when its row was looked at.
        out_B: where to write, uint8, of that grid's size.
        draw: as in `load_patches`.
        left_to_pil: as in `load_patches`.

    Raises:
        UseError: as `load_patches`; or the image is not what it was.
    """
    frames, found = _load_frames(path, spec, num_images, loading, draw, left_to_pil, grid)
    assert found == grid
    cut_patches(frames, spec, patch_format(spec), grid[1], grid[2], out_B)


def _load_frames(
    path: Media,
    spec: ImageSpec,
    num_images: int,
    loading: ImageLoading,
    draw: Draw | None,
    left_to_pil: list[str] | None,
    expected: Grid | None = None,
) -> tuple[list[np.ndarray], Grid]:
    """The frames (tiles) of an image, uint8 [H, W, C] each, and its grid, which is to be the one expected."""
    try:
        with _opened(path) as (file, image):
            size = _seen_size(image, _header_orientation(image, file))
            grid = target_grid(spec, *size, num_images)
            if expected is not None and grid != expected:
                raise use_error(
                    "its size",
                    f"a grid of patches {grid}",
                    f"{expected} as when its row was read",
                    "do not change images during a run",
                )
            views = image_views(spec, *size, grid[1], grid[2], num_images)
            resized = _resizer(file, image, views, spec.resample, loading, draw, left_to_pil)
    except UseError as error:
        raise UseError(f"{media_name(path)}: {error}") from error
    except _BROKEN_IMAGE_ERRORS as error:
        raise _broken_image(path, error) from error
    return [frame for view in views for frame in cut_frames(view, resized(view))], grid


def load_rgb(path: Media) -> Image.Image:
    """Decode one image, turned as its EXIF orientation says.

    Raises:
        UseError: the file is missing, truncated or no image.
    """
    try:
        with _opened(path) as (_file, image):
            return ImageOps.exif_transpose(image).convert("RGB")
    except _BROKEN_IMAGE_ERRORS as error:
        raise _broken_image(path, error) from error


def _resizer(
    file: BinaryIO,
    image: Image.Image,
    views: Sequence[View],
    resample: int,
    loading: ImageLoading,
    draw: Draw | None,
    left_to_pil: list[str] | None,
) -> Callable[[View], np.ndarray]:
    """The decoded image, as what gives a view of it: uint8 [H, W, C]."""
    if loading.backend == "dali":
        from megavlm.data import dali

        kind = dali.left_to_pil(image, image.format == "PNG" and _png_has_late_metadata(file))
        if not kind:
            before = file.tell()
            file.seek(0)
            data = file.read()
            file.seek(before)
            pixels = dali.decode(data, _header_orientation(image, file), loading.device)
            if pixels is not None:
                if draw is not None:
                    shown = augmented(Image.fromarray(dali.as_array(pixels)), draw)
                    pixels = dali.as_pixels(np.asarray(shown))
                return lambda view: dali.resized(pixels, view, resample, loading.device)
            kind = f"{image.format} that DALI cannot decode"
        if left_to_pil is not None:
            left_to_pil.append(kind)
    if loading.jpeg_draft:
        _draft(image, _header_orientation(image, file), views, draw)
    ImageOps.exif_transpose(image, in_place=True)
    shown = image if image.mode == "RGB" else image.convert("RGB")
    shown = shown if draw is None else augmented(shown, draw)
    return lambda view: _resized(shown, view, resample)


def _draft(image: Image.Image, orientation: int, views: Sequence[View], draw: Draw | None) -> None:
    """Tell PIL's JPEG decoder how small the image may become; it takes a half, a quarter or an eighth, or none."""
    width, height = _seen_size(image, orientation)
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


def _broken_image(path: Media, error: Exception) -> UseError:
    # PIL's own words name the file object with its address in memory.
    unknown = isinstance(error, UnidentifiedImageError)
    reason = "cannot identify image file" if unknown else str(error) or type(error).__name__
    return use_error(
        media_name(path), f"unreadable image ({reason})", "a complete image file", "replace it or drop the row"
    )
