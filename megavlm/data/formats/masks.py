"""The column `masks` of a row: for each `<seg>` of its answers what that stands for, as COCO's `segmentation`.

An entry is a segmentation, of the row's first image, or {"segmentation": ..., "image_id": number of an image, from 0}.
A segmentation is a list of polygons, [[x1, y1, x2, y2, ...], ...] in pixels of the image, or {"size": [height, width],
"counts": [...]} with lengths of runs down the columns, outside and inside in turn; `counts` may be COCO's text.

Source: arXiv 1405.0312; cocodataset/cocoapi@8c9bcc3, common/maskApi.c.
"""

import math
from collections.abc import Sequence
from typing import Any

from megavlm.config.tasks import SEGMENT_TOKEN
from megavlm.data.formats.turns import row_error
from megavlm.data.messages import ANSWER_ROLES
from megavlm.data.numbered_images import has_numbers
from megavlm.data.sample import Mask, Turn

_LEAST_NUMBERS = 6
"""Of a polygon: three points."""


def read_masks(listed: Any, turns: Sequence[Turn], num_images: int, where: str) -> tuple[Mask, ...]:
    """The masks of a row.

    Args:
        listed: what the column has.
        turns: of the row.
        num_images: of the row.
        where: file and row, for messages.

    Raises:
        UseError: not as many as tokens in answers, or an entry that is no mask.
    """
    if listed is None:
        return ()
    if not isinstance(listed, list):
        raise row_error(where, f"`masks` of type {type(listed).__name__}", "a list of segmentations")
    num_places = sum(turn.text.count(SEGMENT_TOKEN) for turn in turns if turn.role in ANSWER_ROLES)
    if len(listed) != num_places:
        raise row_error(
            where,
            f"{len(listed)} `masks` and {num_places} {SEGMENT_TOKEN} in answers",
            "as many",
            f"write {SEGMENT_TOKEN} into an answer where each belongs",
        )
    if listed and has_numbers(turns):
        raise row_error(where, "`masks` beside <image:1>", "images as <image>, in the order of `images`")
    return tuple(_mask(entry, num_images, f"{where}: masks[{number}]") for number, entry in enumerate(listed))


def _mask(entry: Any, num_images: int, where: str) -> Mask:
    image = 0
    if isinstance(entry, dict) and "segmentation" in entry:
        image = 0 if entry.get("image_id") is None else entry["image_id"]
        entry = entry["segmentation"]
    if not isinstance(image, int) or isinstance(image, bool) or not 0 <= image < num_images:
        raise row_error(where, f"image_id {str(image)[:40]} with {num_images} images", "a number of the row's images")
    if isinstance(entry, dict):
        return _runs(entry, image, where)
    if not isinstance(entry, list) or not entry or not all(_is_polygon(polygon) for polygon in entry):
        raise row_error(
            where,
            f"{str(entry)[:80]}",
            "polygons [[x1, y1, x2, y2, x3, y3, ...], ...], or an object with size and counts",
        )
    return Mask(polygons=tuple(tuple(float(value) for value in polygon) for polygon in entry), image=image)


def _is_polygon(value: Any) -> bool:
    is_list = isinstance(value, list) and len(value) >= _LEAST_NUMBERS and len(value) % 2 == 0
    return is_list and all(_is_number(one) and math.isfinite(one) for one in value)


def _runs(entry: dict[str, Any], image: int, where: str) -> Mask:
    size, counts = entry.get("size"), entry.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(_is_count(side) and side for side in size):
        raise row_error(where, f"size {str(size)[:40]}", "[height, width] in pixels")
    unpacked = _unpacked(counts) if isinstance(counts, str) else counts
    if not isinstance(unpacked, list) or not all(map(_is_count, unpacked)) or sum(unpacked) != size[0] * size[1]:
        what = f"{len(counts)} characters" if isinstance(counts, str) else str(counts)[:60]
        raise row_error(where, f"counts {what}", f"lengths of runs that add up to {size[0]} x {size[1]} pixels")
    return Mask(size=(size[0], size[1]), run_lengths=tuple(unpacked), image=image)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _unpacked(text: str) -> list[int] | None:
    """Lengths of runs that COCO has packed into a text; None: it is no such text.

    Five bits a character, the lowest first, and a sixth that says whether more follow; from the fourth number on the
    difference to the last but one is written (`rleFrString`).
    """
    counts: list[int] = []
    number = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return None
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
        number = shift = 0
    return None if shift else counts
