"""Rows whose answer is marked good or bad (KTO): beside its own answer, a row reads one that belongs to another row.

How likely the model finds answers that do not fit says how far it has moved from its reference as such: KTO's
reference point (Ethayarajh et al., arXiv 2402.01306, section 4.1: answers y' of other prompts).
"""

import dataclasses
from collections.abc import Callable

from megavlm.config.inputs import Grid
from megavlm.data.formats.columns import BOX_PLACEHOLDER, REFERENCE_PLACEHOLDER
from megavlm.data.messages import ANSWER_ROLES
from megavlm.data.pairs import check_weight, side_by_side
from megavlm.data.readers import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from megavlm.data.sample import EncodedSample, Sample, Turn
from megavlm.errors import UseError, use_error

_PLACEHOLDERS = (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, BOX_PLACEHOLDER, REFERENCE_PLACEHOLDER)


def final_answer(sample: Sample) -> tuple[Turn, ...]:
    """The turns at the end of a row that a model wrote; empty where they show something of their own row."""
    start = len(sample.turns)
    while start and sample.turns[start - 1].role in ANSWER_ROLES:
        start -= 1
    answer = sample.turns[start:]
    shows = any(placeholder in turn.text for turn in answer for placeholder in _PLACEHOLDERS)
    return () if shows else answer


def with_other_answer(sample: Sample, answer: tuple[Turn, ...]) -> Sample:
    """A row that keeps, as rejected conversation, its question with the answer of another row."""
    turns = sample.turns
    while turns and turns[-1].role in ANSWER_ROLES:
        turns = turns[:-1]
    return dataclasses.replace(sample, rejected_turns=(*turns, *answer), rejected_images=None)


def encode_marked(
    sample: Sample, encode: Callable[[Sample], EncodedSample], num_tokens_of: Callable[[Grid], int]
) -> EncodedSample:
    """A marked row: its conversation, and its question with the answer of another row; the target is 1 for good.

    Args:
        sample: of `with_other_answer`.
        encode: of one conversation.
        num_tokens_of: visual tokens of an image by its grid.

    Raises:
        UseError: naming the row: its answer is not marked, or as `encode`.
    """
    try:
        if sample.label is None:
            raise use_error("the row", "no label", "`label`, true or false", "mark the answer, or choose another stage")
        check_weight(sample)
    except UseError as error:
        raise UseError(f"{sample.sample_id}: {error}") from error
    other = dataclasses.replace(sample, turns=sample.rejected_turns)
    return side_by_side(encode(sample), encode(other), float(sample.label), num_tokens_of)
