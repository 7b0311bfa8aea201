"""From the conversations and columns of a row to its Sample: what all formats have in common."""

from typing import Any

from megavlm.data.formats.columns import Columns
from megavlm.data.formats.turns import Conversation, check_order, row_error
from megavlm.data.messages import ANSWER_ROLES
from megavlm.data.sample import Sample, Turn


def with_answer(conversation: Conversation, answer: Turn) -> Conversation:
    """The conversation with another final answer, or with one where it ends with a question."""
    turns = conversation.turns
    asked = turns[:-1] if turns and turns[-1].role in ANSWER_ROLES else turns
    return Conversation([*asked, answer], conversation.named)


def finish(
    columns: Columns,
    sample_id: str,
    chosen: Conversation,
    *,
    require_answer: bool,
    rejected: Conversation | None = None,
    rejected_images: Any = None,
    steps: tuple[str, ...] = (),
    step_labels: tuple[bool, ...] = (),
) -> Sample:
    """Check the conversations against images, videos and boxes, and read the other columns.

    Args:
        columns: of the row.
        sample_id: of the row.
        chosen: its conversation; of a preference row the better one.
        require_answer: whether it must end with an answer; that of a preference row must anyway.
        rejected: of a preference row the whole conversation that is worse; None where only its images are.
        rejected_images: what the row lists as images of that conversation; None: the same.
        steps: that the answer is made of.
        step_labels: whether each of them is right.

    Raises:
        UseError: anything that does not fit together.
    """
    where = columns.where
    is_preference = rejected is not None or rejected_images is not None
    check_order(chosen.turns, where, require_answer=require_answer or is_preference)
    listed_images = columns.peek_images()
    images, videos = columns.images(chosen), columns.videos(chosen)
    boxes = columns.boxes(chosen.turns, len(images))
    masks = columns.masks(chosen.turns, len(images))
    worse = rejected or chosen
    worse_images = None
    if is_preference:
        check_order(worse.turns, where, require_answer=True)
        listed = listed_images if rejected_images is None else rejected_images
        found = columns.images_of(worse, listed)
        worse_images = None if rejected_images is None and found == images else found
        if columns.videos(worse) != videos:
            raise row_error(where, "other videos in the rejected conversation", "the same as in the chosen one")
    if rejected is not None and rejected.turns == chosen.turns and worse_images in (None, images):
        raise row_error(where, "the same answer as chosen and rejected", "two that differ")
    return Sample(
        sample_id=sample_id,
        turns=tuple(chosen.turns),
        images=images,
        videos=videos,
        rejected_turns=tuple(rejected.turns) if rejected is not None else (),
        rejected_images=worse_images,
        margin=columns.margin() if is_preference else None,
        label=columns.label(),
        steps=steps,
        step_labels=step_labels,
        boxes=boxes,
        masks=masks,
        tools=columns.tools(),
        channel=columns.text("channel"),
        weight=columns.weight(),
        extra=columns.rest(),
    )
