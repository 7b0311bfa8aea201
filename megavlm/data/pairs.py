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
    return side_by_side(encode(sample), encode(rejected_of(sample)), sample.margin or 0.0, num_tokens_of)


def side_by_side(
    first: EncodedSample, second: EncodedSample, target: float, num_tokens_of: Callable[[Grid], int]
) -> EncodedSample:
    """Two conversations as one row of two sequences, and images that both show once.

    Args:
        first: with as many images as the second.
        second: the other one.
        target: what the stage wants to know of the row beside.
        num_tokens_of: visual tokens of an image by its grid.
    """
    assert not first.cut and not second.cut, "the recipe lets nobody cut a pair"
    images, uses = _joined(first, second)
    grids = tuple(grid for _image, grid in images)
    return EncodedSample(
        sample_id=first.sample_id,
        tokens_S=np.concatenate((first.tokens_S, second.tokens_S)),
        token_classes_S=np.concatenate((first.token_classes_S, second.token_classes_S)),
        scales_S=np.concatenate((first.scales_S, second.scales_S)),
        position_ids_3S=np.concatenate((first.position_ids_3S, second.position_ids_3S), axis=1),
        images=tuple(image for image, _grid in images),
        grids_thw=grids,
        part_lengths=(len(first.tokens_S), len(second.tokens_S)),
        feature_rows_V=feature_rows(grids, uses, num_tokens_of) if uses else None,
        images_together=first.num_images_together,
        target=target,
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
    check_weight(sample)


def check_weight(sample: Sample) -> None:
    """Raise `UseError` for a row with a weight, which only the loss of tokens knows."""
    if sample.weight != 1:
        raise use_error(
            "weight", sample.weight, "none in rows of compared or marked answers", "repeat or leave out the row"
        )


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
