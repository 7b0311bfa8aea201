"""Where images and videos are: one place that opens all of them, as files of bytes.

A row keeps references (`sample.Media`); nothing is opened before pixels or headers are wanted.
"""

import io
import os
import zipfile
from pathlib import Path
from typing import BinaryIO

from megavlm.data.sample import FileRange, InlineBytes, Media, ZipMember


def media_name(media: Media) -> str:
    """What messages call an image or a video."""
    if isinstance(media, str | Path):
        return str(media)
    if isinstance(media, InlineBytes):
        return media.name
    return f"{media.path}:{media.name}"


def open_media(media: Media) -> BinaryIO:
    """Its bytes, as a file that can be sought in.

    Raises:
        OSError: there is no such file, or not such a member in it.
    """
    if isinstance(media, str | Path):
        return open(media, "rb")
    if isinstance(media, InlineBytes):
        return io.BytesIO(media.data)
    if isinstance(media, ZipMember):
        return _zip_member(media)
    with open(media.path, "rb") as file:
        return io.BytesIO(_whole_range(file, media))


def _whole_range(file: BinaryIO, media: FileRange) -> bytes:
    file.seek(media.offset)
    data = file.read(media.num_bytes)
    if len(data) != media.num_bytes:
        raise OSError(f"{media_name(media)}: the archive ends within it")
    return data


def _zip_member(media: ZipMember) -> BinaryIO:
    try:
        with zipfile.ZipFile(media.path) as archive:
            return io.BytesIO(archive.read(media.name))
    except (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError) as error:
        raise OSError(f"{media_name(media)}: {error}") from error


def relative_name(media: Media, folder: str | os.PathLike[str]) -> str:
    """A file's path seen from a folder; of anything else its name."""
    return os.path.relpath(media, folder) if isinstance(media, str | Path) else media_name(media)
