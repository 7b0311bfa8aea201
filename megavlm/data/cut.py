"""Rows that are too long, cut at a turn."""

import dataclasses
from collections.abc import Sequence

from megavlm.data.messages import ANSWER_ROLES
from megavlm.data.readers import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from megavlm.data.sample import Sample, Turn


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
    """The row's first turns, with the images and videos that stand in them."""
    turns = sample.turns[:num_turns]
    num_images = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    num_videos = sum(turn.text.count(VIDEO_PLACEHOLDER) for turn in turns)
    return dataclasses.replace(
        sample, turns=turns, images=sample.images[:num_images], videos=sample.videos[:num_videos]
    )
