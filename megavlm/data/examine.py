"""One look at consecutive rows: what planning needs to know of each, and what is wrong with it.

Shape suffixes: R rows looked at, G images and videos of the rows that are kept, K numbers of a grid.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megavlm.data.compact import CompactSample, compact, expand
from megavlm.data.encode import SampleEncoder, TooLong
from megavlm.data.pixels import WantedImage, load_pixels
from megavlm.data.sample import Cut, EncodedSample, Sample
from megavlm.errors import UseError

REASONS = ("too_long", "nothing_to_learn", "unreadable_row", "unusable_row", "broken_image")
"""Why rows are left out. The first two are no mistakes; the others are, as reader, encoder and decoder say."""
MISTAKES = REASONS[2:]
CUTS: tuple[Cut, ...] = ("turns", "answer")
"""What was left out of rows that are too long, but not left out whole."""


@dataclass(frozen=True)
class Part:
    """What was found out about consecutive rows.

    Attributes:
        start: number of the first row, from 0.
        reasons_R: int8, 0: the row is kept; otherwise 1 + its place in REASONS.
        num_tokens_R: int64 length in tokens, images included; 0 where the row is not kept.
        cuts_R: int8, 0: the row is not cut; otherwise 1 + its place in CUTS.
        num_images_R: int64 images and videos; 0 where the row is not kept.
        digests_R: uint64 of tokens, their kinds and scales, and positions; 0 where the row is not kept.
        groups_R: uint64 of the groups that rows name; 0 where they name none, or the row is not kept.
        grids_GK: int64 grids of images and videos, row by row.
        messages: of the rows that are not kept, in order: the line for the user, of one without a mistake its id.
        record_bytes_R: int64 lengths of what is kept of their tokens (`compact.py`); 0 where a row is not kept.
        records: of the rows that are kept, one behind the other; empty where they were not asked for, or lie in a file.
    """

    start: int
    reasons_R: np.ndarray
    num_tokens_R: np.ndarray
    cuts_R: np.ndarray
    num_images_R: np.ndarray
    digests_R: np.ndarray
    groups_R: np.ndarray
    grids_GK: np.ndarray
    messages: tuple[str, ...]
    record_bytes_R: np.ndarray
    records: bytes = field(default=b"", repr=False)


def examine(
    samples: Sequence[Sample],
    encoder: SampleEncoder,
    rows: range,
    *,
    check_images: bool = False,
    stop_at_mistake: bool = False,
    keep_tokens: bool = False,
) -> Part:
    """Read and encode rows; headers of images are read, their pixels only when asked for.

    Args:
        samples: all rows.
        encoder: for the model family.
        rows: which of them.
        check_images: decode every image and video whole.
        stop_at_mistake: look no further behind a row with a mistake; the part ends with it.
        keep_tokens: keep what rows are encoded from without their texts.
    """
    reasons, lengths, cuts, counts, digests, groups = [], [], [], [], [], []
    records: list[bytes] = []
    grids: list[tuple[int, ...]] = []
    messages: list[str] = []
    for row in rows:
        found = _examine_row(samples, encoder, row, check_images)
        if isinstance(found, tuple):
            sample, encoded = found
            reasons.append(0)
            lengths.append(len(encoded.tokens_S))
            cuts.append(1 + CUTS.index(encoded.cut) if encoded.cut else 0)
            counts.append(len(encoded.grids_thw))
            digests.append(digest(encoded))
            groups.append(_group_digest(sample.group))
            grids.extend(encoded.grids_thw)
            records.append(_record(encoded, sample, encoder) if keep_tokens else b"")
            continue
        reasons.append(1 + REASONS.index(found.reason))
        lengths.append(0)
        cuts.append(0)
        counts.append(0)
        digests.append(0)
        groups.append(0)
        records.append(b"")
        messages.append(found.message)
        if stop_at_mistake and found.reason in MISTAKES:
            break
    return Part(
        start=rows.start,
        reasons_R=np.array(reasons, dtype=np.int8),
        num_tokens_R=np.array(lengths, dtype=np.int64),
        cuts_R=np.array(cuts, dtype=np.int8),
        num_images_R=np.array(counts, dtype=np.int64),
        digests_R=np.array(digests, dtype=np.uint64),
        groups_R=np.array(groups, dtype=np.uint64),
        grids_GK=np.array(grids, dtype=np.int64).reshape(len(grids), len(grids[0]) if grids else 0),
        messages=tuple(messages),
        record_bytes_R=np.array([len(record) for record in records], dtype=np.int64),
        records=b"".join(records),
    )


@dataclass(frozen=True)
class _LeftOut:
    """Why a row is left out: the reason, and the line for the user."""

    reason: str
    message: str


def _examine_row(
    samples: Sequence[Sample], encoder: SampleEncoder, row: int, check_images: bool
) -> tuple[Sample, EncodedSample] | _LeftOut:
    """The row, and what it becomes."""
    try:
        sample = samples[row]
    except UseError as error:
        return _LeftOut("unreadable_row", str(error))
    try:
        encoded = encoder.encode(sample)
    except TooLong as error:
        return _LeftOut("too_long", error.sample_id)
    except UseError as error:
        return _LeftOut("unusable_row", str(error))
    if not encoder.learns(encoded):
        return _LeftOut("nothing_to_learn", sample.sample_id)
    if check_images:
        try:
            load_pixels([WantedImage(encoded, number) for number in range(len(encoded.images))], encoder)
        except UseError as error:
            return _LeftOut("broken_image", str(error))
    return sample, encoded


def _record(encoded: EncodedSample, sample: Sample, encoder: SampleEncoder) -> bytes:
    """What is kept of a row's tokens; it gives the row again, or nothing would find out later that it does not."""
    inputs, masks = encoder.inputs, encoder.masks
    record = compact(encoded, sample, inputs).to_bytes()
    again = expand(CompactSample.from_bytes(record), sample, encoded.grids_thw, encoded.cut, inputs, masks)
    assert digest(again) == digest(encoded), f"{sample.sample_id}: its tokens are not what was kept of them"
    return record


def _group_digest(group: str) -> int:
    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "little") if group else 0


def digest(sample: EncodedSample) -> int:
    """64 bits of what a row became: tokens, their kinds and scales, positions, grids, masks."""
    state = hashlib.blake2b(digest_size=8)
    for array in (sample.tokens_S, sample.token_classes_S, sample.scales_S, sample.position_ids_3S):
        state.update(np.ascontiguousarray(array).data)
    state.update(repr(sample.grids_thw).encode())
    for mask in sample.masks:
        state.update(repr((mask.position, mask.start)).encode() + mask.shares_V.tobytes())
    return int.from_bytes(state.digest(), "little")
