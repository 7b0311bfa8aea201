"""JSON: one array of rows; a position is (byte offset, length). Rows are numbered from 1."""

import mmap
import os
import re
from collections.abc import Iterator
from typing import Any

from megavlm.data.sources.handles import Handles, RandomAccessFile
from megavlm.data.sources.text import check_row_size, parse_row
from megavlm.errors import UseError, use_error

# What decides where rows begin and end: brackets and commas outside of texts. A text is taken whole.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)
_CLOSES = {b"]": b"[", b"}": b"{"}
_WHITESPACE = b" \t\r\n"


class JsonArrays:
    """Reads rows of JSON files that hold an array; never a whole file in memory."""

    def __init__(self, max_row_bytes: int) -> None:
        self._max_row_bytes = max_row_bytes
        self._files: Handles[RandomAccessFile] = Handles(RandomAccessFile)

    def scan(self, path: str) -> Iterator[tuple[int, tuple[int, int]]]:
        """(row number, position) of each element of the array, found by its brackets; elements are not parsed.

        Raises:
            UseError: no array, or brackets that do not match, so that nothing behind them can be told apart.
        """
        if os.path.getsize(path) == 0:
            raise _no_array(path, b"")
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            yield from _elements(path, text)

    def read(self, path: str, position: tuple[int, int], where: str) -> Any:
        """The row at a position.

        Raises:
            UseError: the row is too long, or broken JSON.
        """
        offset, num_bytes = position
        check_row_size(num_bytes, self._max_row_bytes, where)
        return parse_row(self._files.get(path).read(offset, num_bytes), where)


def _elements(path: str, text: mmap.mmap) -> Iterator[tuple[int, tuple[int, int]]]:
    first = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*").match(text)
    assert first is not None
    if text[first.end() : first.end() + 1] != b"[":
        raise _no_array(path, text[first.end() : first.end() + 1])
    row_number, start, open_brackets = 0, first.end() + 1, [b"["]
    for token in _TOKEN.finditer(text, start):
        kind = token[0][:1]
        if kind in (b"[", b"{"):
            open_brackets.append(kind)
        elif kind in _CLOSES:
            if open_brackets.pop() != _CLOSES[kind]:
                raise _broken(path, row_number + 1, f"{kind.decode()!r} where another bracket is open")
        if not open_brackets or (kind == b"," and len(open_brackets) == 1):
            offset, num_bytes = _stripped(text, start, token.start())
            if num_bytes or row_number or open_brackets:  # `[]` has no rows
                row_number += 1
                yield row_number, (offset, num_bytes)
            start = token.end()
        if not open_brackets:
            break
    if open_brackets:
        raise _broken(path, row_number + 1, "the file's end within it")
    offset, num_bytes = _stripped(text, start, len(text))
    if num_bytes:
        rest = text[offset : offset + 20].decode("utf-8", "replace")
        raise use_error(path, f"{rest!r} behind the array", "the end of the file", "repair the JSON array")


def _stripped(text: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    """(offset, length) without the white space around."""
    while start < end and text[start : start + 1] in _WHITESPACE:
        start += 1
    while end > start and text[end - 1 : end] in _WHITESPACE:
        end -= 1
    return start, end - start


def _no_array(path: str, found: bytes) -> UseError:
    got = f"a file that starts with {found.decode('utf-8', 'replace')!r}"
    return use_error(path, got, "a JSON array of rows", "name it .jsonl if it holds one row a line")


def _broken(path: str, row_number: int, reason: str) -> UseError:
    return use_error(f"{path} row {row_number}", f"broken JSON ({reason})", "valid UTF-8 JSON", "repair the JSON array")
