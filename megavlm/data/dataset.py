"""Rows that encode themselves, and what is left of them after one look at all."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megavlm.data.compact import expand
from megavlm.data.encode import NUM_PARTS, SampleEncoder
from megavlm.data.examine import CUTS, examine
from megavlm.data.index import GridTable, RowIndex, join
from megavlm.data.sample import Cut, EncodedSample, InlineBytes, Sample
from megavlm.errors import use_error

CACHED_TOKENS = 4_000_000
"""Encoded samples are kept in memory up to this many tokens in all (about 37 bytes each)."""


@dataclass(frozen=True)
class PrepareReport:
    """What one look at all rows found.

    Attributes:
        num_rows: rows that were read.
        num_kept: rows that are left.
        num_tokens: tokens of the rows that are left, images included.
        dropped: of the rows that were dropped, by reason (`examine.REASONS`): their lines for the user, or their ids
            where they have no mistake.
        cut: numbers (from 0) of the rows that are too long and left in part, by what was left out: `turns`, `answer`
            (the end of an answer, and what came behind it).
    """

    num_rows: int
    num_kept: int
    num_tokens: int
    dropped: dict[str, tuple[str, ...]]
    cut: dict[str, tuple[int, ...]] = field(default_factory=dict)


class Dataset:
    """Rows that encode themselves; `prepare` or `adopt` first, then `len` and `encoded` speak of the rows left."""

    def __init__(
        self, samples: Sequence[Sample], encoder: SampleEncoder, *, cached_tokens: int = CACHED_TOKENS
    ) -> None:
        """Nothing is encoded yet.

        Args:
            samples: the rows, each read when it is asked for.
            encoder: for the model family.
            cached_tokens: how many tokens of encoded samples to keep; the rest is encoded again when needed.
        """
        self.encoder = encoder
        self.samples = samples
        self._room = cached_tokens
        self._cache: dict[int, EncodedSample] = {}
        self._index: RowIndex | None = None
        self.references: np.ndarray | None = None
        """What a reference model says of every row that is left, once it is known: float32, a row each."""
        self.task_names: tuple[str, ...] = ()
        """Of tasks that are told apart; empty: none are."""
        self.tasks: np.ndarray | None = None
        """Numbers of the tasks of the rows that are left: int64; None: each row names its own, or none of these."""

    def __getstate__(self) -> dict[str, Any]:
        """To a data worker goes nothing that was encoded."""
        return {**self.__dict__, "_cache": {}}

    def prepare(self, *, check_images: bool = False, stop_at_mistake: bool = True) -> PrepareReport:
        """Look at every row in this process (see `examine`), and keep nothing on the disk.

        Raises:
            UseError: naming the row, for a row with a mistake, if it is to stop there; or no row is left.
        """
        assert self.samples
        rows = range(len(self.samples))
        part = examine(self.samples, self.encoder, rows, check_images=check_images, stop_at_mistake=stop_at_mistake)
        index = join([part])
        index.check(stop_at_mistake)
        return self.adopt(index)

    def adopt(self, index: RowIndex) -> PrepareReport:
        """Take over what an index says of these rows."""
        self._index = index
        self._cache = {}
        return PrepareReport(
            num_rows=index.num_rows,
            num_kept=len(index.kept_N),
            num_tokens=int(index.num_tokens_N.sum()),
            dropped={reason: rows.messages for reason, rows in index.dropped.items()},
            cut={part: tuple(rows.tolist()) for part, rows in index.cut.items()},
        )

    def __len__(self) -> int:
        """Rows that are left."""
        return len(self.index.kept_N)

    @property
    def index(self) -> RowIndex:
        """What is known of the rows."""
        assert self._index is not None, "prepare() or adopt() comes first"
        return self._index

    @property
    def num_tokens_each(self) -> np.ndarray:
        """Int64 lengths of the rows that are left."""
        return self.index.num_tokens_N

    def sequence_lengths(self, index: int) -> tuple[int, ...]:
        """Tokens of each sequence of a row; of those of a pair the index knows the sum, and half of it is given."""
        length, parts = int(self.num_tokens_each[index]), NUM_PARTS[self.encoder.row_kind]
        return tuple(length // parts + (number < length % parts) for number in range(parts))

    @property
    def grids_each(self) -> GridTable:
        """Grids of the images of the rows that are left."""
        return self.index.grids

    def sample(self, index: int) -> Sample:
        """The row behind an index of the rows that are left."""
        return self.samples[int(self.index.kept_N[index])]

    def sample_id(self, index: int) -> str:
        """What messages call a row that is left."""
        return self.sample(index).sample_id

    def is_cut(self, index: int) -> bool:
        """Whether only a part of a row is left, because it is too long."""
        return bool(self.index.cuts_N[index])

    def tasks_of(self, indices: Sequence[int]) -> torch.Tensor | None:
        """Numbers of the tasks of rows that are left, int64; a row of none of them has the number behind the last."""
        if not self.task_names:
            return None
        if self.tasks is not None:
            return torch.from_numpy(self.tasks[list(indices)])
        numbers = {name: number for number, name in enumerate(self.task_names)}
        return torch.tensor([numbers.get(self.sample(index).task, len(numbers)) for index in indices])

    def encoded(self, index: int) -> EncodedSample:
        """The tokens of a row that is left: as the index has kept them, or else encoded anew.

        Raises:
            UseError: the row is not what it was when the index was made. Its images may be others, too; that is found
                out where they are decoded. Its text is not looked at again where the index has kept its tokens.
        """
        if index in self._cache:
            return self._cache[index]
        length, grids, sample = int(self.num_tokens_each[index]), self.grids_each[index], self.sample(index)
        if self.index.tokens is None:
            # Of a row that was cut the index knows only the images that are left.
            encoded = self.encoder.encode(sample, () if self.is_cut(index) else grids)
        else:
            cut: Cut = ("", *CUTS)[int(self.index.cuts_N[index])]
            encoder = self.encoder
            encoded = expand(self.index.tokens[index], sample, grids, cut, encoder.inputs, encoder.masks)
        if len(encoded.tokens_S) != length or encoded.grids_thw != grids:
            raise use_error(
                encoded.sample_id,
                f"{len(encoded.tokens_S)} tokens and grids {encoded.grids_thw}",
                f"{length} tokens and grids {grids}, as the index says",
                "do not change rows or images during a run; make the index anew (megavlm data index --rebuild)",
            )
        if length <= self._room and not any(isinstance(image, InlineBytes) for image in encoded.images):
            self._cache[index] = encoded
            self._room -= length
        return encoded
