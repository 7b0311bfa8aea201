"""What a row says of an image or a video, as a reference that can be opened; what must not be opened is refused here.

A row may name a relative or absolute path, a member of a zip archive (`pictures.zip/a/b.jpg`), a data URI, a URL, or
bring the bytes: as they are, or as `{"bytes", "path"}`, which is how Hugging Face datasets keep images. Members of tar
shards come from their source as they are.
"""

import base64
import binascii
import os
import re
from typing import Any, Literal
from urllib.parse import unquote_to_bytes

from megavlm.data.media import REMOTE_PROTOCOLS, zip_member_bytes
from megavlm.data.row_options import RowOptions
from megavlm.data.sample import FileRange, InlineBytes, Media, ZipMember
from megavlm.errors import UseError, use_error

Kind = Literal["image", "video"]

_PROTOCOL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_DATA_URI = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[^;,]*)*)(;base64)?,", re.ASCII)
_ZIP_FOLDER = ".zip" + "/"


class References:
    """Resolves what the rows of one file say of images and videos."""

    def __init__(self, path: str, options: RowOptions) -> None:
        """Where relative paths start.

        Args:
            path: the rows' file.
            options: roots, and what is allowed.
        """
        self._options = options
        self._folder = os.path.abspath(options.image_dir or os.path.dirname(path))
        self._root = os.path.realpath(options.root) if options.root else ""

    def resolve(self, kind: Kind, value: Any, where: str) -> Media:
        """The reference behind a value of a row.

        Args:
            kind: for messages, and of which kind a data URI has to be.
            value: as the row has it.
            where: file and row.

        Raises:
            UseError: it does not exist, is of no known kind, or is refused.
        """
        if isinstance(value, FileRange):
            return value
        given, name = value, f"{kind} in the row"
        if isinstance(value, dict) and set(value) <= {"bytes", "path"}:
            path = value.get("path")
            if value.get("bytes") is None:
                return self.resolve(kind, path, where)
            value, name = value["bytes"], path if isinstance(path, str) and path else name
        if isinstance(value, bytes):
            return InlineBytes(value, name)
        if not isinstance(given, str) or not given:
            got = f"the {kind} {str(value)[:80]}"
            raise use_error(where, got, "a path, a URL, a data URI, or bytes", "repair or remove the row")
        if value.startswith("data:"):
            return _inline(kind, value, where)
        if "://" in value:
            return self._remote(kind, value, where)
        return self._file(kind, value, where)

    def _remote(self, kind: Kind, url: str, where: str) -> str:
        if not self._options.allow_remote:
            raise use_error(
                where,
                f"the {kind} {url[:80]}",
                "a local file (data.allow_remote is false)",
                f"save the {kind} as a file, or set data.allow_remote=true",
            )
        protocol = _PROTOCOL.match(url)
        # `::` chains file systems in fsspec, the last of which may be the local one.
        if protocol is None or protocol[1] not in REMOTE_PROTOCOLS or "::" in url:
            raise use_error(
                where, f"the {kind} {url[:80]}", f"a URL of {', '.join(REMOTE_PROTOCOLS)}", "correct the URL"
            )
        return url

    def _file(self, kind: Kind, value: str, where: str) -> Media:
        if "\0" in value:
            raise use_error(where, f"the {kind} {value[:80]!r}", "a path", "correct the path")
        path = os.path.normpath(os.path.join(self._folder, value))
        archive, member = _split_archive(path)
        if self._root and not _is_inside(os.path.realpath(archive or path), self._root):
            raise use_error(
                where,
                f"the {kind} {path}",
                f"a file in data.root {self._options.root}",
                "correct the path or data.root",
            )
        if archive:
            return self._member(kind, archive, member, value, where)
        if not os.path.isfile(path):
            raise use_error(where, f"no {kind} file {path}", "an existing file", "correct the path or data.image_dir")
        return path

    def _member(self, kind: Kind, archive: str, member: str, value: str, where: str) -> ZipMember:
        if ".." in value.split("/"):
            raise use_error(where, f"the {kind} {value[:80]}", "a member's name without `..`", "correct the path")
        try:
            num_bytes = zip_member_bytes(archive, member)
        except OSError as error:
            raise use_error(
                where, f"no {kind} {error}", "a member of a zip archive", "correct the path or data.image_dir"
            ) from error
        if num_bytes > self._options.max_member_bytes:
            raise use_error(
                where,
                f"the {kind} {value[:80]} of {num_bytes:,} bytes",
                f"at most data.max_member_bytes {self._options.max_member_bytes:,}",
                "leave the row out, or raise data.max_member_bytes",
            )
        return ZipMember(archive, member)


def _split_archive(path: str) -> tuple[str, str]:
    """(archive, member) of a path through a zip file; empty for any other path."""
    start = 0
    while (start := path.lower().find(_ZIP_FOLDER, start)) >= 0:
        end = start + len(_ZIP_FOLDER) - 1
        if os.path.isfile(path[:end]):
            return path[:end], path[end + 1 :]
        start = end
    return "", ""


def _is_inside(path: str, root: str) -> bool:
    return os.path.commonpath((path, root)) == root


def _inline(kind: Kind, uri: str, where: str) -> InlineBytes:
    head = _DATA_URI.match(uri)
    if head is None or not (head[1] or "").startswith(f"{kind}/"):
        raise _bad_uri(kind, uri, where, f"no {kind}/... type")
    body = uri[head.end() :]
    if head[3] is None:
        raise _bad_uri(kind, uri, where, "not base64")
    try:
        data = base64.b64decode(unquote_to_bytes(body) if "%" in body else body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _bad_uri(kind, uri, where, str(error)) from error
    return InlineBytes(data, f"data URI of type {head[1]}")


def _bad_uri(kind: Kind, uri: str, where: str, reason: str) -> UseError:
    return use_error(
        where, f"the {kind} {uri[:40]} ({reason})", f"data:{kind}/...;base64,...", "repair or remove the row"
    )
