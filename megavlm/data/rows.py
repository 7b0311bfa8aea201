"""Rows of many files as one sequence of samples: read when they are asked for, by where they are.

What is kept of a row is its file, its number and its position: 28 bytes.
"""

import contextlib
from array import array
from collections.abc import Sequence
from typing import overload

import numpy as np

from megavlm.data.formats import read_row
from megavlm.data.marked import final_answer, with_other_answer
from megavlm.data.references import References
from megavlm.data.row_options import RowOptions
from megavlm.data.sample import Sample, Turn
from megavlm.data.sources import expand_paths, kind_of, make_sources
from megavlm.errors import UseError, use_error

_OTHERS_TRIED = 16
"""Rows that are looked at for an answer, when those before it are broken or show something."""


class Rows(Sequence[Sample]):
    """Samples of all rows of all files, in order. Picklable; opens files in the process that reads them.

    Attributes:
        paths: the files, patterns and folders resolved.
        options: how rows are read.
    """

    def __init__(self, paths: Sequence[str], options: RowOptions) -> None:
        """Use `open`.

        Args:
            paths: files of rows.
            options: how to read them.
        """
        self.paths = tuple(paths)
        self.options = options
        self._kinds = tuple(kind_of(path) for path in paths)
        self._sources = make_sources(options.max_row_bytes)
        self._references = tuple(References(path, options) for path in paths)
        files, numbers, positions = array("i"), array("q"), array("q")
        for file, (path, kind) in enumerate(zip(self.paths, self._kinds, strict=True)):
            before = len(files)
            for row_number, position in self._sources[kind].scan(path):
                files.append(file)
                numbers.append(row_number)
                positions.extend(position)
            if len(files) == before:
                raise use_error(path, "no rows", "at least one row", "check that the file was written completely")
        self._files = np.frombuffer(files, dtype=np.int32) if files else np.zeros(0, dtype=np.int32)
        self._numbers = np.frombuffer(numbers, dtype=np.int64) if files else np.zeros(0, dtype=np.int64)
        self._positions = np.frombuffer(positions, dtype=np.int64).reshape(-1, 2) if files else np.zeros((0, 2))

    @classmethod
    def open(cls, paths: Sequence[str], options: RowOptions | None = None) -> "Rows":
        """Find all rows; none is read, and one that is wrong says so when it is.

        Args:
            paths: files, folders and patterns, as `sources.expand_paths` takes them.
            options: how to read rows.

        Raises:
            UseError: a file that is missing, of no known kind, without rows, or damaged as a whole.
        """
        return cls(expand_paths(paths), options or RowOptions())

    def __len__(self) -> int:
        """All rows."""
        return len(self._files)

    @property
    def num_rows_each_file(self) -> np.ndarray:
        """Int64 rows of each of the files, in their order."""
        return np.bincount(self._files, minlength=len(self.paths))

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """Read a row, or several.

        Raises:
            IndexError: there is no such row.
            UseError: naming file and row, for anything that is wrong with it.
        """
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        sample = self._read(index)
        return with_other_answer(sample, self._other_answer(index)) if self.options.other_answers else sample

    def _other_answer(self, index: int) -> tuple[Turn, ...]:
        """The answer of a row far away: rows side by side often answer the same question. Broken ones are passed by.

        Raises:
            UseError: no row near there has an answer that can stand elsewhere.
        """
        for further in range(_OTHERS_TRIED):
            with contextlib.suppress(UseError):
                answer = final_answer(self._read((index + len(self) // 2 + further) % len(self)))
                if answer:
                    return answer
        where, expected = self.where(index), "other rows with answers of words alone"
        raise use_error(where, f"none in {_OTHERS_TRIED} rows", expected, "add some, or choose another stage")

    def _read(self, index: int) -> Sample:
        file, where = int(self._files[index]), self.where(index)
        first, second = self._positions[index].tolist()
        try:
            row = self._sources[self._kinds[file]].read(self.paths[file], (first, second), where)
        except OSError as error:
            raise use_error(
                where, f"an unreadable file ({error})", "what was there at the start", "do not move rows"
            ) from error
        return read_row(row, where, self.sample_id(index), self._references[file], self.options)

    def sample_id(self, index: int) -> str:
        """`<file>:<row number, from 1>`, without reading."""
        return f"{self.paths[int(self._files[index])]}:{int(self._numbers[index])}"

    def where(self, index: int) -> str:
        """How messages name a row."""
        return f"{self.paths[int(self._files[index])]} row {int(self._numbers[index])}"
