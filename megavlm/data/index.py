"""The index: of every row what planning needs to know, found out once, without pixels.

Shape suffixes: R rows read, N rows kept, G images and videos of the rows kept, K numbers of a grid.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np

from megavlm.config.inputs import Grid
from megavlm.data.examine import CUTS, MISTAKES, REASONS, Part
from megavlm.data.token_files import TokenFiles
from megavlm.errors import UseError, use_error


class GridTable(Sequence[tuple[Grid, ...]]):
    """The grids of the images of every row: a list of tuples to its users, two arrays in memory."""

    def __init__(self, grids_GK: np.ndarray, num_images_N: np.ndarray) -> None:
        self.grids_GK = grids_GK
        self.num_images_N = num_images_N
        self._starts_N = np.concatenate(([0], np.cumsum(num_images_N)))

    def __len__(self) -> int:
        """Rows."""
        return len(self.num_images_N)

    @overload
    def __getitem__(self, row: int) -> tuple[Grid, ...]: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[tuple[Grid, ...]]: ...
    def __getitem__(self, row: int | slice) -> tuple[Grid, ...] | Sequence[tuple[Grid, ...]]:
        """Grids of a row's images, in their order."""
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        row %= len(self)
        return tuple(tuple(grid) for grid in self.grids_GK[self._starts_N[row] : self._starts_N[row + 1]].tolist())

    def __iter__(self) -> Iterator[tuple[Grid, ...]]:
        return (self[row] for row in range(len(self)))


@dataclass(frozen=True)
class DroppedRows:
    """Rows left out for one reason: their numbers, and of each the line for the user (without a mistake, its id)."""

    rows: np.ndarray
    messages: tuple[str, ...]


@dataclass(frozen=True)
class RowIndex:
    """What is known of the rows of a data set. Row numbers count all rows of all files, from 0.

    Attributes:
        num_rows: that were read.
        kept_N: int64 numbers of the rows that are left.
        num_tokens_N: int64 their lengths, images included.
        cuts_N: int8 what was left out of them (`examine.Part.cuts_R`).
        digests_N: uint64 of what they became (`examine.digest`).
        groups_N: uint64, equal for rows that name the same group; 0: a row names none.
        grids: of their images and videos.
        dropped: rows left out, by reason; only reasons that there are.
        tokens: what rows are encoded from without their texts; None: an index in memory, whose rows are encoded anew.
    """

    num_rows: int
    kept_N: np.ndarray
    num_tokens_N: np.ndarray
    cuts_N: np.ndarray
    digests_N: np.ndarray
    groups_N: np.ndarray
    grids: GridTable
    dropped: dict[str, "DroppedRows"] = field(default_factory=dict)
    tokens: TokenFiles | None = None

    @property
    def digest(self) -> str:
        """Of the rows that are left, in their order, as hexadecimal digits."""
        return hashlib.blake2b(np.ascontiguousarray(self.digests_N).data, digest_size=8).hexdigest()

    @property
    def cut(self) -> dict[str, np.ndarray]:
        """Numbers of the rows of which only a part is left, by what was left out; only what there is."""
        found = {part: self.kept_N[self.cuts_N == code] for code, part in enumerate(CUTS, 1)}
        return {part: rows for part, rows in found.items() if len(rows)}

    @property
    def num_mistakes(self) -> int:
        """Rows left out because of a mistake."""
        return sum(len(rows.messages) for reason, rows in self.dropped.items() if reason in MISTAKES)

    @property
    def mistakes(self) -> list[str]:
        """The lines of all rows with a mistake, in the rows' order."""
        found = [self.dropped[reason] for reason in MISTAKES if reason in self.dropped]
        pairs = [(int(row), line) for each in found for row, line in zip(each.rows, each.messages, strict=True)]
        return [line for _row, line in sorted(pairs)]

    def check(self, stop_at_mistake: bool) -> None:
        """Whether one can train on it.

        Args:
            stop_at_mistake: whether a row with a mistake is one too many.

        Raises:
            UseError: a row with a mistake (the first is named), or no row is left.
        """
        if stop_at_mistake and self.num_mistakes:
            raise UseError(self.mistakes[0])
        if not len(self.kept_N):
            reasons = ", ".join(f"{len(rows.messages)} {reason}" for reason, rows in self.dropped.items())
            raise use_error("data", f"no row left of {self.num_rows} ({reasons})", "at least one", _fix(self.dropped))


def _fix(dropped: dict[str, "DroppedRows"]) -> str:
    return "raise data.max_length" if "too_long" in dropped else "mend the rows (megavlm data check)"


def join(parts: Sequence[Part]) -> RowIndex:
    """The index of parts that follow each other."""
    assert parts
    starts = np.cumsum([0, *(len(part.reasons_R) for part in parts)])
    assert [part.start for part in parts] == starts[:-1].tolist()
    reasons_R = np.concatenate([part.reasons_R for part in parts])
    kept_N = np.flatnonzero(reasons_R == 0)
    grids = [part.grids_GK for part in parts if len(part.grids_GK)]
    left_out = np.flatnonzero(reasons_R)
    messages = [message for part in parts for message in part.messages]
    return RowIndex(
        num_rows=len(reasons_R),
        kept_N=kept_N,
        num_tokens_N=np.concatenate([part.num_tokens_R for part in parts])[kept_N],
        cuts_N=np.concatenate([part.cuts_R for part in parts])[kept_N],
        digests_N=np.concatenate([part.digests_R for part in parts])[kept_N],
        groups_N=np.concatenate([part.groups_R for part in parts])[kept_N],
        grids=GridTable(
            np.concatenate(grids) if grids else np.zeros((0, 3), dtype=np.int64),
            np.concatenate([part.num_images_R for part in parts])[kept_N],
        ),
        dropped={
            reason: DroppedRows(
                np.flatnonzero(reasons_R == code),
                tuple(message for row, message in zip(left_out, messages, strict=True) if reasons_R[row] == code),
            )
            for code, reason in enumerate(REASONS, 1)
            if (reasons_R == code).any()
        },
    )
