"""Rows of images and their text, as two sequences that are read apart: what is shown, and what is said of it.

A model reads each up to its last token, whose hidden state stands for the whole (E5-V, Jiang et al., arXiv 2407.12580;
VLM2Vec, Jiang et al., arXiv 2410.05160). There is no second encoder for texts.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from megavlm.config.inputs import Grid
from megavlm.data.marked import final_answer
from megavlm.data.messages import ANSWER_ROLES
from megavlm.data.pairs import check_weight, side_by_side
from megavlm.data.readers import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from megavlm.data.sample import EncodedSample, Sample, Turn
from megavlm.errors import UseError, use_error


@dataclass(frozen=True)
class ImageTextPrompts:
    """What a model is told beside images and texts.

    Attributes:
        image: stands behind the images in place of the row's own question; empty: the question as it is.
        text: stands behind the text; empty: nothing.
    """

    image: str = ""
    text: str = ""


def encode_image_text(
    sample: Sample,
    encode_prompt: Callable[[Sample], EncodedSample],
    num_tokens_of: Callable[[Grid], int],
    prompts: ImageTextPrompts,
) -> EncodedSample:
    """A row's images, then its final answer, each as a question that is not answered.

    Args:
        sample: a row with images (or videos) and an answer.
        encode_prompt: of a conversation without an answer.
        num_tokens_of: visual tokens of an image by its grid.
        prompts: what is said beside.

    Raises:
        UseError: naming the row: it has no image, its answer has no text of its own, it has a weight, or as
            `encode_prompt`.
    """
    try:
        shown, said = shown_of(sample, prompts), said_of(sample, prompts)
        check_weight(sample)
    except UseError as error:
        raise UseError(f"{sample.sample_id}: {error}") from error
    return side_by_side(encode_prompt(shown), encode_prompt(said), 0.0, num_tokens_of)


def shown_of(sample: Sample, prompts: ImageTextPrompts) -> Sample:
    """The row up to its final answer, or with another question."""
    if not sample.images and not sample.videos:
        raise use_error(
            "the row", "no image", "an image (or a video), and its text as the answer", "complete or remove the row"
        )
    turns = sample.turns
    while turns and turns[-1].role in ANSWER_ROLES:
        turns = turns[:-1]
    if prompts.image:
        placeholders = IMAGE_PLACEHOLDER * len(sample.images) + VIDEO_PLACEHOLDER * len(sample.videos)
        asked = Turn("user", f"{placeholders}\n{prompts.image}")
        return dataclasses.replace(sample, turns=(asked,), boxes=())
    return dataclasses.replace(sample, turns=turns)


def said_of(sample: Sample, prompts: ImageTextPrompts) -> Sample:
    """The text of the final answer, as a row of its own."""
    text = text_of(sample)
    return Sample(sample.sample_id, (Turn("user", f"{text}\n{prompts.text}" if prompts.text else text),))


def text_of(sample: Sample) -> str:
    """What is said of a row's images.

    Raises:
        UseError: nothing, or not in words alone.
    """
    text = "\n".join(turn.text for turn in final_answer(sample) if turn.role == "assistant").strip()
    if not text:
        raise use_error(
            "the row",
            "no text to its images",
            "a caption as its last answer, in words alone",
            "complete or remove the row",
        )
    return text
