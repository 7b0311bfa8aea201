"""Rows that are too long, cut at a turn, or where the limit falls into an answer.

Shape suffix: S tokens of one sample.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from megavlm.config.tasks import SEGMENT_TOKEN
from megavlm.data.messages import ANSWER_ROLES
from megavlm.data.readers import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from megavlm.data.sample import EncodedSample, Sample, Turn
from megavlm.data.token_weights import RESPONSE

TooLongRule = Literal["drop", "cut_turns", "cut_answer", "stop"]


def cut_row(
    sample: Sample, max_length: int, rule: TooLongRule, encode: Callable[[Sample], EncodedSample]
) -> EncodedSample | None:
    """As many whole exchanges as fit, and with `cut_answer` a part of the next answer; None: nothing is to be left.

    Args:
        sample: a row with more than `max_length` tokens.
        max_length: of what is left, in tokens.
        rule: what may be cut.
        encode: a row of any length to tokens.
    """
    ends = exchange_ends(sample.turns)
    if rule not in ("cut_turns", "cut_answer") or not ends:
        return None
    fitting: EncodedSample | None = None
    low, high = 0, len(ends) + (ends[-1] < len(sample.turns))  # the first `low` fit, the first `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        encoded = encode(first_turns(sample, ends[middle - 1]))
        if len(encoded.tokens_S) <= max_length:
            low, fitting = middle, dataclasses.replace(encoded, cut="turns")
        else:
            high = middle
    if rule == "cut_answer" and low < len(ends):
        for number in range(ends[low - 1] if low else 0, ends[low]):
            # A call of a tool is of use as a whole only.
            if sample.turns[number].role == "assistant":
                begun = _cut_answer(encode(first_turns(sample, number + 1)), max_length)
                if begun is not None:
                    return begun
    return fitting


def exchange_ends(turns: Sequence[Turn]) -> list[int]:
    """Numbers of turns after which a conversation can end: behind each question with all that answers it.

    What tools are asked and say belongs to the question before.
    """
    return [
        number
        for number in range(1, len(turns) + 1)
        if turns[number - 1].role in ANSWER_ROLES and (number == len(turns) or turns[number].role == "user")
    ]


def first_turns(sample: Sample, num_turns: int) -> Sample:
    """The row's first turns, with the images, videos and masks that stand in them."""
    turns = sample.turns[:num_turns]
    num_images = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    num_videos = sum(turn.text.count(VIDEO_PLACEHOLDER) for turn in turns)
    num_masks = sum(turn.text.count(SEGMENT_TOKEN) for turn in turns)
    return dataclasses.replace(
        sample,
        turns=turns,
        images=sample.images[:num_images],
        videos=sample.videos[:num_videos],
        masks=sample.masks[:num_masks],
    )


def _cut_answer(encoded: EncodedSample, length: int) -> EncodedSample | None:
    """The row's first `length` tokens, if the next one is of its last answer, too; images are never in answers."""
    answer_S = np.flatnonzero(encoded.token_classes_S >= RESPONSE)
    between_S = encoded.token_classes_S[length - 1 : answer_S[-1] + 1]
    if len(between_S) < 2 or not (between_S >= RESPONSE).all():
        return None
    return dataclasses.replace(
        encoded,
        tokens_S=encoded.tokens_S[:length],
        token_classes_S=encoded.token_classes_S[:length],
        scales_S=encoded.scales_S[:length],
        position_ids_3S=encoded.position_ids_3S[:, :length],
        masks=tuple(mask for mask in encoded.masks if mask.position < length),
        cut="answer",
    )
