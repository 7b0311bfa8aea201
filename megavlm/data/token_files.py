"""What the index keeps of the tokens of the rows that are left: read from its files, row by row, when it is asked for.

In memory there are 8 bytes a row.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megavlm.data.compact import CompactSample
from megavlm.data.sources.handles import Handles, RandomAccessFile
from megavlm.errors import use_error

_MAX_OPEN = 128
"""Files that a process keeps open: one is of 1024 rows. Reading, not mapping: that would hold open as many as there
are, and processes may have 1024."""


class TokenFiles:
    """Records of rows, one behind the other, in as many files as the index has parts; picklable."""

    def __init__(self, paths: Sequence[Path], num_bytes_each: Sequence[np.ndarray]) -> None:
        """Nothing is read.

        Args:
            paths: the parts' files.
            num_bytes_each: int64 lengths of the records in each of them.

        Raises:
            UseError: a file is not as long as its records.
            OSError: a file is not there.
        """
        self._paths = [str(path) for path in paths]
        self._first_rows = np.cumsum([0, *map(len, num_bytes_each)])
        self._ends_N = np.concatenate([np.cumsum(num_bytes) for num_bytes in num_bytes_each])
        self._files: Handles[RandomAccessFile] = Handles(RandomAccessFile, _MAX_OPEN)
        for path, num_bytes in zip(paths, num_bytes_each, strict=True):
            if path.stat().st_size != num_bytes.sum():
                raise use_error(
                    str(path),
                    f"{path.stat().st_size} bytes",
                    f"{int(num_bytes.sum())}, as the index says",
                    "make the index anew (megavlm data index --rebuild, or remove its folder)",
                )

    def __len__(self) -> int:
        """Rows that are left."""
        return len(self._ends_N)

    def __getitem__(self, row: int) -> CompactSample:
        """What is kept of a row that is left.

        Raises:
            UseError: the file is not there any more.
        """
        part = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        start = 0 if row == self._first_rows[part] else int(self._ends_N[row - 1])
        try:
            record = self._files.get(self._paths[part]).read(start, int(self._ends_N[row]) - start)
        except OSError as error:
            raise use_error(
                self._paths[part],
                f"an unreadable file ({error})",
                "the index as it was at the start",
                "do not move or remove it during a run",
            ) from error
        return CompactSample.from_bytes(record)
