"""The rows of files one by one, so that a row that cannot be read does not hide those behind it."""

import json
import os
from collections.abc import Sequence
from typing import Any, overload

from megavlm.config.schema import DataConfig
from megavlm.data import readers
from megavlm.data.sample import Sample
from megavlm.errors import UseError, use_error


def open_rows(paths: Sequence[str], data: DataConfig | None = None) -> Sequence[Sample]:
    """All rows of all files, in order; taking one that cannot be read raises its UseError.

    Args:
        paths: `.json` (an array of rows) or `.jsonl` (one row a line) files.
        data: how rows are read; None: by the defaults.

    Raises:
        UseError: a file that is missing, empty, or holds no rows.
    """
    return _ReadRows(paths, (data or DataConfig()).image_dir)


def read_row(samples: Sequence[Sample], row: int) -> Sample | UseError:
    """A row, or why it cannot be read."""
    try:
        return samples[row]
    except UseError as error:
        return error


class _ReadRows(Sequence[Sample]):
    """Lines are kept, rows are parsed when they are asked for."""

    def __init__(self, paths: Sequence[str], image_dir: str) -> None:
        self._image_dir = image_dir
        self._rows: list[tuple[str, int, Any]] = []
        for path in paths:
            if not os.path.isfile(path) or not path.endswith((".json", ".jsonl")):
                raise use_error(path, "no such file of rows", "a .json or .jsonl file", "correct the path")
            if path.endswith(".jsonl"):
                with open(path, "rb") as file:
                    self._rows += [(path, number, line) for number, line in enumerate(file, 1) if line.strip()]
            else:
                self._rows += [(path, number, row) for number, row in readers._iterate_json(path)]
        if not self._rows:
            raise use_error(", ".join(paths), "no rows", "at least one row", "check that it was written completely")

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, row: int) -> Sample: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[Sample]: ...
    def __getitem__(self, row: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        path, number, content = self._rows[row]
        if isinstance(content, bytes):
            try:
                content = json.loads(content.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise readers._broken_json(f"{path} row {number}", error) from error
        image_root = os.path.abspath(self._image_dir or os.path.dirname(path))
        return readers._RowReader(path, number, image_root, require_answer=True).read(content)
