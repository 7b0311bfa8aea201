"""Images that texts name by number: `<image:2>` is the second image of the row, counted from 1.

Where a row names an image so, its images are shown with a name, as Qwen-VL's and ms-swift's numbered pictures are:
`Picture 2: ` and the image. Pixels are shown once: an image that stands in the conversation already is only named,
`Picture 2`, also in answers. `<image>` stands for the first image of the row that is not shown yet.
"""

import dataclasses
import re
from collections.abc import Sequence

from megavlm.data.readers import IMAGE_PLACEHOLDER
from megavlm.data.sample import Sample, Turn
from megavlm.errors import use_error

_REFERENCE = re.compile(r"<image(?::(\d+))?>")


def has_numbers(turns: Sequence[Turn]) -> bool:
    """Whether any text names an image by number."""
    return any(found.group(1) for turn in turns for found in _REFERENCE.finditer(turn.text))


def show_numbered(sample: Sample) -> Sample:
    """The row with names in place of numbers, and its images in the order in which they are shown.

    Raises:
        UseError: a number without an image, an image that is not shown, or shown in an answer.
    """
    if not has_numbers(sample.turns):
        return sample
    shown: list[int] = []
    turns = []
    for turn in sample.turns:

        def name(found: re.Match[str], role: str = turn.role) -> str:
            hidden = [number for number in range(len(sample.images)) if number not in shown]
            number = int(found.group(1)) - 1 if found.group(1) else (hidden or [len(sample.images)])[0]
            if not 0 <= number < len(sample.images):
                raise use_error(
                    f"a {role} turn",
                    f"{found.group()} and {len(sample.images)} images",
                    "the number of an image of the row, from 1",
                    "correct the number",
                )
            if number in shown:
                return f"Picture {number + 1}"
            if role in ("assistant", "tool_call"):
                raise use_error(
                    "an answer", f"{found.group()}, which is not shown yet", "images in questions only", "move it"
                )
            shown.append(number)
            return f"Picture {number + 1}: {IMAGE_PLACEHOLDER}"

        turns.append(dataclasses.replace(turn, text=_REFERENCE.sub(name, turn.text)))
    hidden = sorted(set(range(len(sample.images))) - set(shown))
    if hidden:
        raise use_error(
            "the row",
            f"image {hidden[0] + 1} nowhere in its texts",
            "every image named",
            f"write <image:{hidden[0] + 1}>",
        )
    return dataclasses.replace(sample, turns=tuple(turns), images=tuple(sample.images[number] for number in shown))
