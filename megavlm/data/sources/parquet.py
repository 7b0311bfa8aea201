"""Parquet: a position is (row group, row in it). A row group is decoded as a whole, so small ones shuffle faster."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from megavlm.data.sources.handles import Handles
from megavlm.errors import UseError, use_error

MAX_ROW_GROUP_BYTES = 4 << 30
"""Decoded size of a row group, as its file states it."""
_KEPT_BYTES = 256 << 20
"""Decoded row groups are kept up to this size in all, the last one always."""


class ParquetFiles:
    """Reads rows of parquet files, one row group at a time."""

    def __init__(self) -> None:
        self._files: Handles[_OpenParquet] = Handles(_OpenParquet, max_open=4)

    def scan(self, path: str) -> Iterator[tuple[int, tuple[int, int]]]:
        """(row number, position) of each row, from the file's footer: no row is decoded.

        Raises:
            UseError: no parquet file.
        """
        row_number = 0
        for group, num_rows in enumerate(self._files.get(path).num_rows_each):
            for row in range(num_rows):
                row_number += 1
                yield row_number, (group, row)

    def read(self, path: str, position: tuple[int, int], where: str) -> Any:
        """The row at a position, without its empty columns.

        Raises:
            UseError: the file is damaged, or its row group larger than `MAX_ROW_GROUP_BYTES`.
        """
        group, row = position
        with self._files.lock:  # a ParquetFile has a position
            table = self._files.get(path).group(group, where)
        return row_of(table, row, where)


def row_of(table: Any, number: int, where: str) -> dict[str, Any]:
    """A row of an Arrow table or record batch, without the columns that have nothing in it.

    Raises:
        UseError: what is in it is no text, number or list of such.
    """
    try:
        row: dict[str, Any] = table.slice(number, 1).to_pylist()[0]
    except (ValueError, NotImplementedError) as error:  # texts that are not UTF-8, dates before the year 1 ...
        reason = " ".join(str(error).split())
        raise use_error(where, f"unreadable columns ({reason})", "valid ones", "repair or remove the row") from error
    return {key: value for key, value in row.items() if value is not None}


class _OpenParquet:
    def __init__(self, path: str) -> None:
        # Here, not at the top: who reads no tables is spared the import.
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            # Memory-mapped: pages that are not needed any more go without saying.
            self._file = pq.ParquetFile(path, memory_map=True)
        except (pa.ArrowException, OSError) as error:
            raise _broken(path, error) from error
        metadata = self._file.metadata
        self.num_rows_each = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._groups: OrderedDict[int, Any] = OrderedDict()

    def group(self, number: int, where: str) -> Any:
        """A row group as an Arrow table."""
        import pyarrow as pa

        if number in self._groups:
            self._groups.move_to_end(number)
            return self._groups[number]
        num_bytes = self._file.metadata.row_group(number).total_byte_size
        if num_bytes > MAX_ROW_GROUP_BYTES:
            raise use_error(
                where,
                f"a row group of {num_bytes:,} bytes",
                f"at most {MAX_ROW_GROUP_BYTES:,}",
                "write the file again with smaller row groups (row_group_size=100)",
            )
        try:
            # No threads: this may run in forked data workers, several on a machine.
            table = self._file.read_row_group(number, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise _broken(where, error) from error
        self._groups[number] = table
        while len(self._groups) > 1 and sum(kept.nbytes for kept in self._groups.values()) > _KEPT_BYTES:
            self._groups.popitem(last=False)
        return table


def _broken(where: str, error: Exception) -> UseError:
    reason = " ".join(str(error).split())
    return use_error(where, f"unreadable parquet ({reason})", "a complete parquet file", "write it again")
