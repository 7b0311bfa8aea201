"""JSONL: one row a line; a position is (byte offset, length). Row numbers are line numbers."""

import mmap
import os
from collections.abc import Iterator
from typing import Any

from megavlm.data.sources.handles import Handles, RandomAccessFile
from megavlm.data.sources.text import check_row_size, parse_row

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SHORT_LINE = 256


class JsonlFiles:
    """Reads rows of JSONL files."""

    def __init__(self, max_row_bytes: int) -> None:
        self._max_row_bytes = max_row_bytes
        self._files: Handles[RandomAccessFile] = Handles(RandomAccessFile)

    def scan(self, path: str) -> Iterator[tuple[int, tuple[int, int]]]:
        """(row number, position) of each line that is not blank; lines are neither parsed nor held in memory."""
        if os.path.getsize(path) == 0:
            return
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            start = len(_BYTE_ORDER_MARK) if text[:3] == _BYTE_ORDER_MARK else 0
            row_number = 0
            while start < len(text):
                row_number += 1
                end = text.find(b"\n", start)
                end = len(text) if end < 0 else end
                # A blank line of megabytes is one to complain about, not one to look through.
                if end - start > _SHORT_LINE or text[start:end].strip():
                    yield row_number, (start, end - start)
                start = end + 1

    def read(self, path: str, position: tuple[int, int], where: str) -> Any:
        """The row at a position.

        Raises:
            UseError: the row is too long, or broken JSON.
        """
        offset, num_bytes = position
        check_row_size(num_bytes, self._max_row_bytes, where)
        return parse_row(self._files.get(path).read(offset, num_bytes), where)
