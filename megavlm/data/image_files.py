"""Image files: opened by PIL, their headers read; nothing is decoded here."""

import contextlib
import struct
import warnings
from collections.abc import Iterator
from typing import BinaryIO

from PIL import ExifTags, Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from megavlm.config.schema import DataConfig
from megavlm.data.media import media_name, open_media
from megavlm.data.sample import Media
from megavlm.errors import UseError, use_error

# What PIL's decoders raise for broken files; MemoryError and bugs of our own are not among them.
BROKEN_IMAGE_ERRORS = (
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
        with opened(path) as (file, image):
            width_px, height_px = seen_size(image, header_orientation(image, file))
    except BROKEN_IMAGE_ERRORS as error:
        raise broken_image(path, error) from error
    if width_px * height_px > max_pixels:
        raise use_error(
            media_name(path),
            f"an image of {width_px}x{height_px} pixels",
            f"at most data.max_image_pixels {max_pixels:,} of them",
            "shrink the image, or raise data.max_image_pixels",
        )
    return width_px, height_px


@contextlib.contextmanager
def opened(path: Media) -> Iterator[tuple[BinaryIO, Image.Image]]:
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


def seen_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    """(width, height) in pixels once the orientation is applied."""
    width, height = image.size
    return (height, width) if orientation >= 5 else (width, height)


def header_orientation(image: Image.Image, file: BinaryIO) -> int:
    """EXIF orientation (1 to 8; from 5 on width and height swap) that decoding will still apply."""
    if image.format == "TIFF":
        return 1  # PIL gives a TIFF's size with its orientation applied already.
    if isinstance(image, PngImagePlugin.PngImageFile) and not png_has_late_metadata(file):
        # PngImageFile.getexif would decode the whole image to look behind the pixels.
        exif = Image.Image.getexif(image)
    else:
        exif = image.getexif()
    return int(exif.get(ExifTags.Base.Orientation, 1))


def png_has_late_metadata(file: BinaryIO) -> bool:
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


def broken_image(path: Media, error: Exception) -> UseError:
    """What is said of a file that PIL cannot read."""
    # PIL's own words name the file object with its address in memory.
    unknown = isinstance(error, UnidentifiedImageError)
    reason = "cannot identify image file" if unknown else str(error) or type(error).__name__
    return use_error(
        media_name(path), f"unreadable image ({reason})", "a complete image file", "replace it or drop the row"
    )
