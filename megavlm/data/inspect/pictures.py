"""What is known of an image once it was decoded whole: its size, its hashes, or what is wrong with it."""

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import imagehash
import numpy as np

from megavlm.data.images import load_rgb
from megavlm.data.inspect.processes import map_items
from megavlm.data.media import media_name, open_media
from megavlm.data.sample import InlineBytes, Media, Sample
from megavlm.errors import UseError, use_error

HASH_SIDE = 16
"""The perceptual hash has this squared of bits. With the usual 64, unrelated small images in black and white are as
near to each other as an image is to its JPEG; with 256 they are not."""
HASH_BYTES = HASH_SIDE**2 // 8


@dataclass(frozen=True)
class Picture:
    """One image.

    Attributes:
        name: for messages.
        problem: `missing_image` or `broken_image`; empty: none.
        message: of the problem, a line for the user.
        width_px: as it is seen.
        height_px: as it is seen.
        digest: of the file's bytes.
        looks: perceptual hash, HASH_BYTES bytes.
    """

    name: str
    problem: str = ""
    message: str = ""
    width_px: int = 0
    height_px: int = 0
    digest: bytes = b""
    looks: bytes = b""


def look_at(media: Media, *, with_looks: bool = True) -> Picture:
    """Decode an image whole.

    The perceptual hash is pHash (the lowest frequencies of a cosine transform against their median), as the `imagehash`
    package computes it.

    Args:
        media: where the image is.
        with_looks: compute the perceptual hash, too.
    """
    name = media_name(media)
    try:
        with open_media(media) as file:
            data = file.read()
    except OSError as error:
        reason = str(use_error(name, f"no image ({error.strerror or error})", "an image file", "correct the path"))
        return Picture(name, "missing_image", reason)
    try:
        image = load_rgb(InlineBytes(data, name))
    except UseError as error:
        return Picture(name, "broken_image", str(error))
    looks = np.packbits(imagehash.phash(image, hash_size=HASH_SIDE).hash).tobytes() if with_looks else b""
    return Picture(name, "", "", image.width, image.height, hashlib.blake2b(data, digest_size=16).digest(), looks)


def images_of(sample: Sample) -> tuple[Media, ...]:
    """All images of a row, those of its worse answer included."""
    return sample.images + (sample.rejected_images or ())


def look_at_all(media: Iterable[Media], nproc: int = 1, *, with_looks: bool = True) -> dict[Media, Picture]:
    """Decode every image once, however many rows show it; in the order of first appearance."""
    each: Sequence[Media] = list(dict.fromkeys(media))
    work = functools.partial(look_at, with_looks=with_looks)
    return dict(zip(each, map_items(work, each, nproc), strict=True))
