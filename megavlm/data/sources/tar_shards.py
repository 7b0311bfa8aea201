"""WebDataset shards: uncompressed tar files whose members belong together where their names agree up to the first dot.

Of a group, `.json` has the row, or else `.txt` a caption; images and videos are those of the row, in order, and stay
where they are: a reference is bytes of the shard. A position is (offset of the group's first header, offset behind
its last member). The convention: github.com/webdataset/webdataset, README "The WebDataset Format".
"""

import os
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from megavlm.data.sample import FileRange
from megavlm.data.sources.text import check_row_size, parse_row
from megavlm.errors import UseError, use_error

IMAGE_ENDINGS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm"})
VIDEO_ENDINGS = frozenset({"mp4", "avi", "mkv", "webm", "mov", "m4v", "mpg", "mpeg"})
CAPTION_KEY = "txt"
_GZIP = b"\x1f\x8b"


class TarShards:
    """Reads rows of tar shards."""

    def __init__(self, max_row_bytes: int) -> None:
        self._max_row_bytes = max_row_bytes

    def scan(self, path: str) -> Iterator[tuple[int, tuple[int, int]]]:
        """(row number, position) of each group, from the headers of its members.

        Raises:
            UseError: a compressed or damaged tar file.
        """
        key, start, row_number, end = None, 0, 0, 0
        with open(path, "rb") as file:
            for member in _members(file, path, 0, None):
                if _split(member.name)[0] != key:
                    if key is not None:
                        row_number += 1
                        yield row_number, (start, member.offset)
                    key, start = _split(member.name)[0], member.offset
                end = member.offset_data + member.size
        if key is not None:
            yield row_number + 1, (start, end)

    def read(self, path: str, position: tuple[int, int], where: str) -> Any:
        """The row of a group: what its `.json` says, its caption as `txt`, and its files as `images` and `videos`.

        Raises:
            UseError: members with unsafe names, links, a broken row, or files that the row does not name.
        """
        row: dict[str, Any] = {}
        media: dict[str, list[FileRange]] = {"images": [], "videos": []}
        seen: set[str] = set()
        with open(path, "rb") as file:
            for member in _members(file, path, *position):
                _check_member(member, seen, where)
                key, ending = _split(member.name)
                at = FileRange(path, member.offset_data, member.size, member.name)
                if ending in ("json", "txt"):
                    check_row_size(member.size, self._max_row_bytes, where)
                    data = os.pread(file.fileno(), member.size, member.offset_data)
                    row.update(_caption(data, at, where) if ending == "txt" else _row(data, at, where))
                elif ending.rpartition(".")[2] in IMAGE_ENDINGS:
                    media["images"].append(at)
                elif ending.rpartition(".")[2] in VIDEO_ENDINGS:
                    media["videos"].append(at)
                row["__key__"] = key
        return _with_media(row, media, where)


def _members(file: BinaryIO, path: str, start: int, end: int | None) -> Iterator[tarfile.TarInfo]:
    """Members whose headers are between two offsets; folders are left out."""
    file.seek(start)
    if start == 0 and file.peek(2)[:2] == _GZIP:  # type: ignore[attr-defined]  # of a BufferedReader
        raise use_error(path, "a compressed tar file", "an uncompressed one, to read from anywhere", f"gunzip {path}")
    try:
        with tarfile.TarFile(fileobj=file, mode="r") as archive:
            while (member := archive.next()) is not None and (end is None or member.offset < end):
                archive.members = []  # type: ignore[attr-defined]  # else all headers stay in memory
                if not member.isdir():
                    yield member
            if member is None:
                _check_end(file, archive.offset)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise use_error(
            path, f"an unreadable tar file ({error})", "a complete uncompressed tar file", "write it again"
        ) from error


def _check_end(file: BinaryIO, offset: int) -> None:
    """The library takes a damaged header for the archive's end; rows behind it would be gone without a word."""
    if any(os.pread(file.fileno(), tarfile.BLOCKSIZE, offset)):
        raise tarfile.ReadError(f"a damaged header at byte {offset}")


def _split(name: str) -> tuple[str, str]:
    """(what a group's names have in common, the rest in lower case): `a/b.seg.PNG` is `a/b` and `seg.png`."""
    folder, base = os.path.split(name)
    stem, _, ending = base.partition(".")
    return os.path.join(folder, stem), ending.lower()


def _check_member(member: tarfile.TarInfo, seen: set[str], where: str) -> None:
    if member.name in seen:
        raise use_error(where, f"two members called {member.name!r}", "each name once", "write the shard again")
    seen.add(member.name)
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise use_error(
            where, f"a member called {member.name!r}", "relative names without `..`", "write the shard again"
        )
    if not member.isreg() or member.issparse():
        raise use_error(where, f"{member.name!r}, a link or special file", "plain files", "write the shard again")


def _caption(data: bytes, member: FileRange, where: str) -> dict[str, Any]:
    try:
        return {CAPTION_KEY: data.decode("utf-8").strip()}
    except UnicodeDecodeError as error:
        raise use_error(where, f"{member.name!r} ({error})", "UTF-8 text", "repair or remove the row") from error


def _row(data: bytes, member: FileRange, where: str) -> dict[str, Any]:
    row = parse_row(data, where)
    if not isinstance(row, dict):
        raise use_error(where, f"{member.name!r} with a {type(row).__name__}", "a JSON object", "repair the row")
    return row


def _with_media(row: dict[str, Any], media: dict[str, list[FileRange]], where: str) -> dict[str, Any]:
    """Members take the place of the names that the row has for them; a row that names none gets them in order."""
    for key, members in media.items():
        named = next((name for name in (key, key.removesuffix("s")) if row.get(name)), None)
        if not members:
            continue
        if named is None:
            row[key] = members
        else:
            listed = row[named] if isinstance(row[named], list) else [row[named]]
            row[named] = [_member_of(entry, members, where) for entry in listed]
    return row


def _member_of(entry: Any, members: list[FileRange], where: str) -> FileRange:
    for member in members:
        names = (member.name, os.path.basename(member.name), os.path.basename(member.name).partition(".")[2])
        if entry in names:
            return member
    raise _no_member(entry, members, where)


def _no_member(entry: Any, members: list[FileRange], where: str) -> UseError:
    names = ", ".join(os.path.basename(member.name) for member in members)
    return use_error(where, f"{str(entry)[:80]!r} in the row", f"files of its group ({names})", "correct the row")
