"""Rows that say and show what an earlier row does, exactly or nearly; the first is kept."""

import re
import unicodedata
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from datasketch import MinHash, MinHashLSH

from megavlm.data.inspect.check import origins
from megavlm.data.inspect.pictures import images_of, look_at_all
from megavlm.data.inspect.rows import read_row
from megavlm.data.media import media_name
from megavlm.data.sample import Sample
from megavlm.errors import UseError, use_error

By = Literal["both", "image", "text"]

SHINGLE_WORDS = 3
_PERMUTATIONS = 128
_NO_WORD = re.compile(r"[^\w]+")


@dataclass(frozen=True)
class Dropped:
    """A row that is dropped, and the one that is kept in its stead; rows count from 0."""

    row: int
    sample_id: str
    kept: str


@dataclass(frozen=True)
class DedupReport:
    """What `find_duplicates` found.

    Attributes:
        num_rows: that were looked at.
        kept: numbers of the rows that stay, ascending.
        dropped: in the rows' order.
        problems: lines about rows that cannot be read, which stay out, too.
    """

    num_rows: int
    kept: tuple[int, ...]
    dropped: tuple[Dropped, ...]
    problems: tuple[str, ...]


def find_duplicates(
    samples: Sequence[Sample],
    *,
    by: By = "both",
    exact: bool = False,
    max_distance: int = 16,
    min_similarity: float = 1.0,
    nproc: int = 1,
) -> DedupReport:
    """Go through the rows; each that is like an earlier one that stays is dropped.

    Args:
        samples: all rows.
        by: what must be alike: images and texts, images (rows without one stay), or texts.
        exact: images byte for byte, and texts to the letter; else as the next two say.
        max_distance: bits of 256 in which perceptual hashes of images may differ.
        min_similarity: of texts: the Jaccard index of their sets of three consecutive words, case and punctuation
            aside; 1: the same words.
        nproc: processes that decode images.

    Raises:
        UseError: a similarity or distance that is out of range.
    """
    if not 0 < min_similarity <= 1:
        raise use_error("--min-similarity", min_similarity, "more than 0, at most 1", "choose a number in between")
    rows = [read_row(samples, row) for row in range(len(samples))]
    readable = [(row, read) for row, read in enumerate(rows) if isinstance(read, Sample)]
    shown = _image_keys([sample for _, sample in readable], exact, max_distance, nproc) if by != "text" else None
    groups: dict[Hashable, _Texts] = {}
    kept: list[int] = []
    dropped: list[Dropped] = []
    for number, (row, sample) in enumerate(readable):
        key = shown[number] if shown is not None else ()
        if by == "image" and not key:
            kept.append(row)
            continue
        group = groups.setdefault(key, _Texts(by == "image", exact, min_similarity))
        earlier = group.find_or_add(sample)
        if earlier:
            dropped.append(Dropped(row, sample.sample_id, earlier))
        else:
            kept.append(row)
    problems = tuple(str(read) for read in rows if isinstance(read, UseError))
    return DedupReport(len(rows), tuple(kept), tuple(dropped), problems)


def _image_keys(samples: Sequence[Sample], exact: bool, max_distance: int, nproc: int) -> list[tuple[Hashable, ...]]:
    """For each row a key that rows with like images, in the same order, share; a broken image is like itself only."""
    pictures = look_at_all((image for sample in samples for image in images_of(sample)), nproc)
    whole = [image for image, picture in pictures.items() if not picture.problem]
    same, alike = origins([pictures[image] for image in whole], max_distance)
    key_of: dict[Hashable, Hashable] = {image: media_name(image) for image in pictures}
    key_of.update(zip(whole, same if exact else alike, strict=True))
    videos = [tuple(media_name(video) for video in sample.videos) for sample in samples]
    return [
        (*(key_of[image] for image in images_of(sample)), *clips) for sample, clips in zip(samples, videos, strict=True)
    ]


class _Texts:
    """The texts of kept rows whose images are alike."""

    def __init__(self, ignore: bool, exact: bool, min_similarity: float) -> None:
        self._ignore = ignore
        self._exact = exact
        self._min_similarity = min_similarity
        self._same: dict[Hashable, str] = {}
        self._kept: list[tuple[str, frozenset[str]]] = []
        self._near: MinHashLSH | None = None

    def find_or_add(self, sample: Sample) -> str:
        """Id of an earlier row that this is like; empty: none, and the row is remembered."""
        words = () if self._ignore else words_of(sample)
        key: Hashable = words if not self._exact or self._ignore else (sample.turns, sample.rejected_turns)
        if key in self._same:
            return self._same[key]
        if self._min_similarity < 1 and not self._exact and not self._ignore:
            earlier = self._find_near(sample.sample_id, shingles_of(words))
            if earlier:
                return earlier
        self._same[key] = sample.sample_id
        return ""

    def _find_near(self, sample_id: str, shingles: frozenset[str]) -> str:
        if self._near is None:
            # Candidates are looked for a little below the wanted similarity, and then compared in full.
            self._near = MinHashLSH(threshold=max(0.1, self._min_similarity - 0.1), num_perm=_PERMUTATIONS)
        sketch = MinHash(num_perm=_PERMUTATIONS, seed=1)
        sketch.update_batch([shingle.encode() for shingle in sorted(shingles)])
        for number in sorted(self._near.query(sketch)):
            earlier, its_shingles = self._kept[number]
            if jaccard(shingles, its_shingles) >= self._min_similarity:
                return earlier
        self._near.insert(len(self._kept), sketch)
        self._kept.append((sample_id, shingles))
        return ""


def words_of(sample: Sample) -> tuple[str, ...]:
    """The words of a row's turns, roles included, case and punctuation aside."""
    texts = [f"{turn.role} {turn.text}" for turn in sample.turns + sample.rejected_turns]
    plain = unicodedata.normalize("NFKC", " ".join(texts)).casefold()
    return tuple(word for word in _NO_WORD.split(plain) if word)


def shingles_of(words: Sequence[str]) -> frozenset[str]:
    """Sets of consecutive words; of fewer words than one holds, all of them."""
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return frozenset(" ".join(words[start : start + SHINGLE_WORDS]) for start in range(last))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Share of what two sets have in common."""
    return float(np.divide(len(one & other), max(1, len(one | other))))
