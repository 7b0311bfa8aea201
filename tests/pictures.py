"""Two hundred images of odd sizes, formats and modes, cut out of real photographs, and some broken ones."""

import functools
import itertools
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import sklearn.datasets
from PIL import Image, PngImagePlugin

PHOTO_DIR = Path(sklearn.datasets.__file__).parent / "images"
PHOTOS = ("china.jpg", "flower.jpg")
NUM_PICTURES = 200
FORMATS = {"jpg": "JPEG"}
"""PIL's name of a format, where it is not the file's ending."""

SIZES = [
    (1, 1), (2, 1), (1, 5), (3, 3), (7, 5), (13, 200), (199, 1), (200, 1), (201, 1), (1, 3000), (3000, 1), (20000, 3),
    (3, 20000), (20000, 101), (28, 28), (56, 28), (27, 29), (31, 33), (32, 64), (65, 47), (84, 85), (100, 99),
    (224, 224), (225, 223), (300, 40), (33, 400), (336, 336), (384, 384), (385, 383), (448, 448), (449, 447),
    (500, 480), (512, 31), (640, 427), (640, 100), (101, 427),
]  # fmt: skip


def write_pictures(folder: Path) -> list[Path]:
    """All of them, named by what they are; always the same."""
    pictures = dict(_odd_ones())
    for number in range(NUM_PICTURES - len(pictures)):
        width, height = np.random.RandomState(number).randint(1, 420, 2)
        suffix = ("jpg", "png", "webp", "bmp", "gif")[number % 5]
        name = f"{number}-{width}x{height}.{suffix}"
        pictures[name] = encoded(photo(number, width, height), FORMATS.get(suffix, suffix.upper()))
    assert len(pictures) == NUM_PICTURES
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in pictures]


def write_broken(folder: Path) -> list[Path]:
    """Files of each format that end too early, and files that are none."""
    image = photo(0, 150, 120)
    whole = {
        "x.jpg": encoded(image, "JPEG"),
        "progressive.jpg": encoded(image, "JPEG", progressive=True),
        "x.png": encoded(image, "PNG"),
        "x.webp": encoded(image, "WEBP"),
        "x.gif": encoded(image, "GIF"),
        "x.tiff": encoded(image, "TIFF"),
        "x.bmp": encoded(image, "BMP"),
    }
    paths = []
    for name, data in whole.items():
        for percent in (0, 10, 50, 90):
            paths.append(folder / f"{percent}-{name}")
            paths[-1].write_bytes(data[: len(data) * percent // 100])
    return paths


def photo(seed: int, width: int, height: int) -> Image.Image:
    """A piece of a photograph; larger than the photograph, it is put together of several."""
    pixels_HWC = _photograph(PHOTOS[seed % len(PHOTOS)])
    rows = (np.arange(height) + 37 * seed) % pixels_HWC.shape[0]
    columns = (np.arange(width) + 61 * seed) % pixels_HWC.shape[1]
    return Image.fromarray(np.ascontiguousarray(pixels_HWC[rows][:, columns]))


@functools.cache
def _photograph(name: str) -> np.ndarray:
    with Image.open(PHOTO_DIR / name) as opened:
        return np.asarray(opened)


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    """The bytes of a file."""
    file = BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def _odd_ones() -> Iterator[tuple[str, bytes]]:
    for seed, (width, height) in enumerate(SIZES):
        suffix = ("png", "jpg")[seed % 2]
        yield f"{width}x{height}.{suffix}", encoded(photo(seed, width, height), FORMATS.get(suffix, "PNG"))
    for orientation, suffix in itertools.product(range(1, 9), ("jpg", "png", "webp", "tiff")):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"lossless": True} if suffix == "webp" else {}
        image_format = FORMATS.get(suffix, suffix.upper())
        yield f"exif{orientation}.{suffix}", encoded(photo(orientation, 130, 61), image_format, exif=exif, **options)
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    yield "xmp6.jpg", encoded(photo(3, 90, 61), "JPEG", xmp=xmp)
    yield "late-exif.png", _with_late_exif(encoded(photo(3, 90, 61), "PNG"))
    for quality, subsampling, progressive in itertools.product((5, 40, 75, 100), (0, 1, 2), (False, True)):
        name = f"q{quality}-s{subsampling}{'-progressive' if progressive else ''}.jpg"
        options = {"quality": quality, "subsampling": subsampling, "progressive": progressive}
        yield name, encoded(photo(quality + subsampling, 117, 93), "JPEG", **options)
    for mode, suffix in itertools.product(("L", "CMYK", "YCbCr"), ("jpg", "tiff")):
        yield f"{mode}.{suffix}", encoded(photo(4, 77, 103).convert(mode), FORMATS.get(suffix, "TIFF"))
    yield "rgb-colours.jpg", encoded(photo(5, 77, 103), "JPEG", keep_rgb=True)
    yield from _modes_of_png()
    yield from _several_frames()


def _modes_of_png() -> Iterator[tuple[str, bytes]]:
    image = photo(6, 90, 70)
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 90).astype(np.uint8), (70, 1)))
    palette = image.quantize(64)
    transparent = image.copy()
    transparent.putalpha(alpha)
    deep = (np.asarray(image.convert("L")).astype(np.uint16) << 8) + 77
    modes = {
        "1": image.convert("1"),
        "L": image.convert("L"),
        "LA": transparent.convert("LA"),
        "RGBA": transparent,
        "P": palette,
        "I16": Image.fromarray(deep),
        "I16-dark": Image.fromarray(deep >> 6),
    }
    for name, one in modes.items():
        yield f"mode-{name}.png", encoded(one, "PNG")
    yield "palette-with-a-transparent-entry.png", encoded(palette, "PNG", transparency=3)
    yield "palette-with-alpha.png", encoded(palette, "PNG", transparency=bytes(range(0, 256, 4)))
    yield "palette-of-2-bits.png", encoded(image.quantize(4), "PNG", bits=2)
    yield "colour-with-a-transparent-one.png", encoded(image, "PNG", transparency=image.getpixel((3, 3)))
    yield "grey-with-a-transparent-one.png", encoded(image.convert("L"), "PNG", transparency=90)
    for name, colour_type in (("RGB16", 2), ("RGBA16", 6), ("LA16", 4)):
        yield f"mode-{name}.png", _png_of_16_bits(colour_type, {2: 3, 6: 4, 4: 2}[colour_type])
    gamma = PngImagePlugin.PngInfo()
    gamma.add(b"gAMA", struct.pack(">I", 100_000))
    yield "gamma.png", encoded(image, "PNG", pnginfo=gamma)
    yield "transparent.webp", encoded(transparent, "WEBP", lossless=True)
    yield "transparent.tiff", encoded(transparent, "TIFF")
    yield "palette.gif", encoded(palette, "GIF", transparency=5)
    yield "palette.bmp", encoded(palette, "BMP")
    yield "float.tiff", encoded(image.convert("F"), "TIFF")
    yield "integer.tiff", encoded(image.convert("I"), "TIFF")


def _several_frames() -> Iterator[tuple[str, bytes]]:
    frames = [photo(seed, 80, 60) for seed in (7, 8, 9)]
    for suffix, image_format in (("gif", "GIF"), ("png", "PNG"), ("webp", "WEBP"), ("tiff", "TIFF"), ("mpo", "MPO")):
        data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:])
        yield f"frames.{suffix}", data


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png_of_16_bits(colour_type: int, num_channels: int) -> bytes:
    """PIL reads these, but writes none."""
    values = np.random.RandomState(colour_type).randint(0, 65536, (40, 30 * num_channels)).astype(">u2")
    header = struct.pack(">IIBBBBB", 30, 40, 16, colour_type, 0, 0, 0)
    lines = b"".join(b"\0" + line.tobytes() for line in values)
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(lines)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _with_late_exif(png: bytes) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    end = png.rindex(b"IEND") - 4
    return png[:end] + _chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\x00\x00")) + png[end:]
