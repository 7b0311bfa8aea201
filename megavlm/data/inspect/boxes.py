"""Boxes of a row that lie outside its images: those of its `objects`, and those written into its texts.

In texts the unit is not stated. A row's boxes are taken for shares of the sides (0 to 1), for pixels, or for
thousandths (0 to 1000, Qwen2-VL and InternVL), whichever fits all of them; a box is wrong where none does.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence

from megavlm.data.sample import Box, Sample

Size = tuple[int, int]
"""(width, height) in pixels."""

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_QWEN = re.compile(rf"<\|box_start\|>\({_NUMBER},{_NUMBER}\),\({_NUMBER},{_NUMBER}\)<\|box_end\|>")
_BINS = re.compile(r"<\|box_start\|>" + r"<\|(\d{1,3})\|>" * 4 + r"<\|box_end\|>")
_TAGGED = re.compile(r"<box>(.*?)</box>", re.DOTALL)
_JSON_BOX = re.compile(rf'"bbox(?:_2d)?"\s*:\s*\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]')
_FOUR = re.compile(rf"{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}")


def written_boxes(text: str) -> Iterator[tuple[float, ...]]:
    """(x1, y1, x2, y2) of boxes in a text: `<box>[[..]]</box>`, box tokens, JSON with `bbox_2d` or `bbox`."""
    for match in _TAGGED.finditer(text):
        for numbers in _FOUR.findall(match.group(1)):
            yield tuple(map(float, numbers))
    for pattern in (_QWEN, _BINS, _JSON_BOX):
        for match in pattern.finditer(text):
            yield tuple(map(float, match.groups()))


def wrong_boxes(sample: Sample, sizes: Sequence[Size]) -> list[str]:
    """What is wrong with a row's boxes, one line each.

    Args:
        sample: the row.
        sizes: of its images.
    """
    found = [problem for box in sample.boxes if box.corners and (problem := _wrong_object(box, sizes))]
    written = [box for turn in sample.turns + sample.rejected_turns for box in written_boxes(turn.text)]
    for box in written:
        if _is_reversed(box):
            found.append(f"the box {_shown(box)} in a text ends before it begins")
    upright = [box for box in written if not _is_reversed(box)]
    if upright and not any(all(_fits(box, limit) for box in upright) for limit in [(1, 1), (1000, 1000), *sizes]):
        # Boxes of several images may each fit another one.
        outside = [box for box in upright if not any(_fits(box, limit) for limit in [(1000, 1000), *sizes])]
        of_sizes = ", ".join(f"{width} x {height}" for width, height in sizes) or "no image"
        found += [f"the box {_shown(box)} in a text, with images of {of_sizes} pixels" for box in outside]
    return found


def _wrong_object(box: Box, sizes: Sequence[Size]) -> str:
    name = f"the box {_shown(box.corners)} of `{box.reference}`"
    if not 0 <= box.image < len(sizes):
        return f"{name} in image {box.image} of {len(sizes)}"
    if not all(math.isfinite(value) for value in box.corners):
        return f"{name} is no place"
    if _is_reversed(box.corners):
        return f"{name} ends before it begins"
    limit = (1, 1) if box.unit == "norm1" else sizes[box.image]
    if not _fits(box.corners, limit):
        return f"{name} lies outside {limit[0]} x {limit[1]} ({'shares' if box.unit == 'norm1' else 'pixels'})"
    return ""


def _is_reversed(corners: Sequence[float]) -> bool:
    return len(corners) == 4 and (corners[2] < corners[0] or corners[3] < corners[1])


def _fits(corners: Sequence[float], limit: Size) -> bool:
    width, height = limit
    return all(0 <= x <= width for x in corners[::2]) and all(0 <= y <= height for y in corners[1::2])


def _shown(corners: Sequence[float]) -> str:
    return json.dumps([int(value) if value == int(value) else value for value in corners if math.isfinite(value)])
