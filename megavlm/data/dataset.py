"""Rows that encode themselves, and the one pass over them before training.

Shape suffixes: P patches, C values of a flattened patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megavlm.config.inputs import Grid
from megavlm.data.encode import SampleEncoder, TooLong
from megavlm.data.images import load_patches
from megavlm.data.media import media_name
from megavlm.data.sample import EncodedSample, Sample, VideoClip
from megavlm.data.videos import load_video_patches
from megavlm.errors import UseError, use_error

CACHED_TOKENS = 4_000_000
"""Encoded samples are kept in memory up to this many tokens in all (about 36 bytes each)."""


@dataclass(frozen=True)
class PrepareReport:
    """What `Dataset.prepare` found.

    Attributes:
        num_rows: rows that were read.
        num_kept: rows that are left.
        num_tokens: tokens of the rows that are left, images included.
        dropped: sample ids of the rows that were dropped, by reason: `too_long`, `nothing_to_learn`.
    """

    num_rows: int
    num_kept: int
    num_tokens: int
    dropped: dict[str, tuple[str, ...]]


class Dataset:
    """Rows that encode themselves; `prepare` first, then `len` and `encoded` speak of the rows that are left."""

    def __init__(
        self, samples: Sequence[Sample], encoder: SampleEncoder, *, cached_tokens: int = CACHED_TOKENS
    ) -> None:
        """Nothing is encoded yet.

        Args:
            samples: the rows, as read.
            encoder: for the model family.
            cached_tokens: how many tokens of encoded samples to keep; the rest is encoded again when needed.
        """
        self.encoder = encoder
        self._samples = samples
        self._cached_tokens = cached_tokens
        self._cache: dict[int, EncodedSample] = {}
        self._kept: list[int] | None = None
        self.num_tokens_each = np.zeros(0, dtype=np.int64)
        self.grids_each: list[tuple[Grid, ...]] = []

    def prepare(self) -> PrepareReport:
        """Encode every row once (image headers, no pixels), drop what cannot be trained on, and report it.

        Depends on nothing but the rows, so every rank gets the same result.

        Raises:
            UseError: naming the row, for anything that is wrong rather than too long; or no row is left.
        """
        kept: list[int] = []
        lengths: list[int] = []
        grids: list[tuple[Grid, ...]] = []
        dropped: dict[str, list[str]] = {"too_long": [], "nothing_to_learn": []}
        num_cached = 0
        self._cache = {}
        for row, sample in enumerate(self._samples):
            try:
                encoded = self.encoder.encode(sample)
            except TooLong:
                dropped["too_long"].append(sample.sample_id)
                continue
            if not encoded.loss_weights_S[1:].any():
                dropped["nothing_to_learn"].append(sample.sample_id)
                continue
            length = len(encoded.tokens_S)
            kept.append(row)
            lengths.append(length)
            grids.append(encoded.grids_thw)
            if num_cached + length <= self._cached_tokens:
                self._cache[row] = encoded
                num_cached += length
        if not kept:
            reasons = ", ".join(f"{len(ids)} {reason}" for reason, ids in dropped.items())
            raise use_error(
                "data", f"no row left of {len(self._samples)} ({reasons})", "at least one", "raise data.max_length"
            )
        self._kept = kept
        self.num_tokens_each = np.array(lengths, dtype=np.int64)
        self.grids_each = grids
        return PrepareReport(
            num_rows=len(self._samples),
            num_kept=len(kept),
            num_tokens=sum(lengths),
            dropped={reason: tuple(ids) for reason, ids in dropped.items() if ids},
        )

    def __len__(self) -> int:
        """Rows that are left after `prepare`."""
        return len(self._rows)

    @property
    def _rows(self) -> list[int]:
        assert self._kept is not None, "prepare() comes first"
        return self._kept

    @property
    def kept_rows(self) -> np.ndarray:
        """int64: which of the rows that were read are left, ascending."""
        return np.array(self._rows, dtype=np.int64)

    def sample(self, index: int) -> Sample:
        """The row behind an index of the rows that are left."""
        return self._samples[self._rows[index]]

    def encoded(self, index: int) -> EncodedSample:
        """The tokens of a row that is left."""
        row = self._rows[index]
        cached = self._cache.get(row)
        return cached if cached is not None else self.encoder.encode(self._samples[row])


def load_sample_patches(sample: EncodedSample, encoder: SampleEncoder) -> list[torch.Tensor]:
    """Decode all images and videos of a sample: float32 [P, C] each.

    Raises:
        UseError: as `load_image_patches`.
    """
    return [load_image_patches(sample, number, encoder) for number in range(len(sample.images))]


def load_image_patches(sample: EncodedSample, number: int, encoder: SampleEncoder) -> torch.Tensor:
    """Decode one image (or video) of a sample: float32 [P, C].

    Raises:
        UseError: naming the row, for an unreadable image, or one whose size changed since its header was read.
    """
    source, grid = sample.images[number], sample.grids_thw[number]
    path = source.path if isinstance(source, VideoClip) else source
    try:
        if isinstance(source, VideoClip):
            assert encoder.video_spec is not None
            patches_PC = load_video_patches(source, grid, encoder.video_spec)
        else:
            num_images = sum(not isinstance(image, VideoClip) for image in sample.images)
            patches_PC = load_patches(source, encoder.image_spec, num_images)
        expected = grid[0] * grid[1] * grid[2]
        if len(patches_PC) != expected:
            raise use_error(
                media_name(path),
                f"{len(patches_PC)} patches",
                f"{expected} by its header",
                "do not change images during a run",
            )
    except UseError as error:
        raise UseError(f"{sample.sample_id}: {error}") from error
    return patches_PC
