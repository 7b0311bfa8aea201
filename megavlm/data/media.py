"""Where images and videos are: one place that opens all of them, as files of bytes.

A row keeps references (`sample.Media`); nothing is opened before pixels or headers are wanted. Which references a row
may have at all is decided where rows are read (`references.py`).
"""

import functools
import io
import lzma
import os
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from megavlm.data.sample import FileRange, FrameFiles, InlineBytes, Media, ZipMember

REMOTE_PROTOCOLS = "s3 s3a gs gcs az abfs abfss adl oci oss hf http https hdfs webhdfs ftp sftp ssh smb memory".split()
"""Of URLs that fsspec opens for rows. Those that reach local files (file, local, git, reference ...) are not among
them: rows are not to read what a path of theirs may not."""
MAX_REMOTE_BYTES = 1 << 30
"""Largest file behind a URL."""

# What zipfile raises for damaged and encrypted archives, and for members that are not there.
_BROKEN_ZIP_ERRORS = (
    zipfile.BadZipFile,
    KeyError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
)


def media_name(media: Media | FrameFiles) -> str:
    """What messages call an image or a video."""
    if isinstance(media, str | Path):
        return str(media)
    if isinstance(media, InlineBytes):
        return media.name
    if isinstance(media, FrameFiles):
        return f"{media_name(media.files[0])} and {len(media.files) - 1} more frames"
    return f"{media.path}:{media.name}"


def open_media(media: Media) -> BinaryIO:
    """Its bytes, as a file that can be sought in.

    Raises:
        OSError: there is no such file, or not such a member in it.
    """
    if isinstance(media, str) and "://" in media:
        return _remote(media)
    if isinstance(media, str | Path):
        return open(media, "rb")
    if isinstance(media, InlineBytes):
        return io.BytesIO(media.data)
    if isinstance(media, ZipMember):
        return _zip_member(media)
    with open(media.path, "rb") as file:
        return io.BytesIO(_whole_range(file, media))


def _remote(url: str) -> BinaryIO:
    import fsspec

    if url.partition("://")[0] not in REMOTE_PROTOCOLS or "::" in url:
        raise OSError(f"a URL of {', '.join(REMOTE_PROTOCOLS)} is expected")
    try:
        with fsspec.open(url, "rb") as file:
            data = file.read(MAX_REMOTE_BYTES + 1)
    except ImportError as error:  # fsspec loads the client of a store when it is asked for
        raise OSError(f"{error}; pip install what it names") from error
    except Exception as error:
        # Each store's client has exceptions of its own; whatever it was, this one file could not be read.
        raise OSError(f"{type(error).__name__}: {error}") from error
    if len(data) > MAX_REMOTE_BYTES:
        raise OSError(f"more than {MAX_REMOTE_BYTES:,} bytes")
    return io.BytesIO(data)


def _whole_range(file: BinaryIO, media: FileRange) -> bytes:
    file.seek(media.offset)
    data = file.read(media.num_bytes)
    if len(data) != media.num_bytes:
        raise OSError(f"{media_name(media)}: the archive ends within it")
    return data


def zip_member_bytes(path: str, name: str) -> int:
    """Size of a member when it is unpacked, as the archive states it; reading gives no more.

    Raises:
        OSError: no such archive, or not such a member.
    """
    try:
        return _open_zip(path, os.getpid()).getinfo(name).file_size
    except _BROKEN_ZIP_ERRORS as error:
        raise OSError(f"{path}:{name}: {error}") from error


def _zip_member(media: ZipMember) -> BinaryIO:
    try:
        return io.BytesIO(_open_zip(media.path, os.getpid()).read(media.name))
    except _BROKEN_ZIP_ERRORS as error:
        raise OSError(f"{media_name(media)}: {error}") from error


@functools.lru_cache(maxsize=8)
def _open_zip(path: str, process: int) -> zipfile.ZipFile:
    """Kept open, since an archive's list of members may be long; for each process, which has its own file positions."""
    return zipfile.ZipFile(path)


def shown_file(media: Media, folder: Path, name: str) -> str:
    """A file that a page in a folder can show, as a path from there; bytes of a row or an archive are written there.

    Args:
        media: of an image.
        folder: of the page.
        name: of the file that is written, where the image has none of its own.

    Raises:
        OSError: it cannot be read or written.
    """
    if isinstance(media, str | Path) and "://" not in str(media):
        return os.path.relpath(media, folder)
    with open_media(media) as file:
        data = file.read()
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return name
