"""Rows with a better and a worse answer: both conversations in one encoded row, their images once.

Both are sequences of their own, with positions and borders of their own; they are packed side by side, so that one
forward pass reads both, and an image that both show is encoded once.

Shape suffixes: S tokens of a sequence, V visual tokens.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from megavlm.config.inputs import Grid
from megavlm.data.sample import EncodedSample, Media, Sample, VideoClip
from megavlm.errors import UseError, use_error

PAIR_PARTS = 2
"""The chosen conversation, then the rejected one."""


def encode_pair(
    sample: Sample, encode: Callable[[Sample], EncodedSample], num_tokens_of: Callable[[Grid], int]
) -> EncodedSample:
    """Both conversations of a preference row, the chosen one first.

    Args:
        sample: a row with rejected turns, rejected images, or both.
        encode: of one conversation.
        num_tokens_of: visual tokens of an image by its grid.

    Raises:
        UseError: naming the row: it has no rejected answer, its conversations show different numbers of images, or as
            `encode`.
    """
    try:
        check_pair(sample)
    except UseError as error:
        raise UseError(f"{sample.sample_id}: {error}") from error
    chosen = encode(sample)
    rejected = encode(rejected_of(sample))
    assert not chosen.cut and not rejected.cut, "the recipe lets nobody cut a pair"
    images, uses = _joined(chosen, rejected)
    grids = tuple(grid for _image, grid in images)
    return EncodedSample(
        sample_id=sample.sample_id,
        tokens_S=np.concatenate((chosen.tokens_S, rejected.tokens_S)),
        token_classes_S=np.concatenate((chosen.token_classes_S, rejected.token_classes_S)),
        scales_S=np.concatenate((chosen.scales_S, rejected.scales_S)),
        position_ids_3S=np.concatenate((chosen.position_ids_3S, rejected.position_ids_3S), axis=1),
        images=tuple(image for image, _grid in images),
        grids_thw=grids,
        part_lengths=(len(chosen.tokens_S), len(rejected.tokens_S)),
        feature_rows_V=feature_rows(grids, uses, num_tokens_of) if uses else None,
        images_together=chosen.num_images_together,
        target=sample.margin or 0.0,
    )


def check_pair(sample: Sample) -> None:
    """Raise `UseError` unless a row says which of two answers is better, and how far."""
    if not sample.rejected_turns and sample.rejected_images is None:
        raise use_error(
            "the row",
            "no answer that is worse",
            "a rejected answer (rejected_response, rejected_messages, rejected) or rejected_images",
            "complete it, or choose train.stage=sft",
        )
    if sample.rejected_images is not None and len(sample.rejected_images) != len(sample.images):
        raise use_error(
            "rejected_images",
            f"{len(sample.rejected_images)} images",
            f"{len(sample.images)}, one in place of each image of the row",
            "give as many",
        )
    if sample.weight != 1:
        raise use_error("weight", sample.weight, "none in a row with two answers", "repeat or leave out the row")


def rejected_of(sample: Sample) -> Sample:
    """The worse conversation as a row of its own."""
    return dataclasses.replace(
        sample,
        turns=sample.rejected_turns or sample.turns,
        images=sample.images if sample.rejected_images is None else sample.rejected_images,
    )


def _joined(*sequences: EncodedSample) -> tuple[list[tuple[Media | VideoClip, Grid]], list[int]]:
    """Each image with its grid once, and which of them the sequences show, in the order in which they do."""
    images: list[tuple[Media | VideoClip, Grid]] = []
    uses = []
    for sequence in sequences:
        for shown in zip(sequence.images, sequence.grids_thw, strict=True):
            if shown not in images:
                images.append(shown)
            uses.append(images.index(shown))
    return images, uses


def feature_rows(grids: Sequence[Grid], uses: Sequence[int], num_tokens_of: Callable[[Grid], int]) -> np.ndarray:
    """Which feature each visual token takes, int64 [V].

    Args:
        grids: of the images, in the order of their features.
        uses: numbers of images, in the order in which the text shows them.
        num_tokens_of: visual tokens of an image by its grid.
    """
    starts = np.cumsum([0, *map(num_tokens_of, grids)])
    return np.concatenate([np.arange(starts[use], starts[use + 1], dtype=np.int64) for use in uses])
