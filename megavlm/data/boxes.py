"""`<ref-object>` and `<bbox>` in the texts of a row become what a family writes for things in an image.

Notations, as their models were trained with them:
- `qwen_tokens_1000`: `<|object_ref_start|>a cat<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>`, coordinates
  in thousandths of the image's sides. Qwen2-VL, arXiv:2409.12191, section 2.2.1 and appendix.
- `qwen_tokens_pixels`: the same in pixels of the image as the model sees it, after it was resized.
- `json_pixels`: `{"bbox_2d": [x1, y1, x2, y2], "label": "a cat"}` in such pixels. Qwen2.5-VL, arXiv:2502.13923, and
  cookbooks/spatial_understanding.ipynb of QwenLM/Qwen2.5-VL.
- `json_1000`: the same in thousandths. Qwen3-VL, cookbooks/2d_grounding.ipynb of QwenLM/Qwen3-VL.
- `numbers`: `[x1, y1, x2, y2]` as the row has them.
- `bin_tokens_1000`: `<|box_start|><|x1|><|y1|><|x2|><|y2|><|box_end|>`, each coordinate one token out of 1000, of which
  the first is the left or upper edge and the last the right or lower one. Pix2Seq, arXiv:2109.10852, section 2.1.
- `grid_tokens_32`: `<phrase>a cat</phrase><object><patch_index_0044><patch_index_0863></object>`, the cells of a grid
  of 32 x 32 that the box's upper left and lower right corners lie in. Kosmos-2, arXiv:2306.14824, section 2.1.

With JSON, a `<ref-object>` right in front of a `<bbox>` is one object; elsewhere (say, in JSON that the row has
written itself) a name is its text, and a box its list of numbers. Points have two numbers, and `point_2d`.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence

from megavlm.config.tasks import (
    BIN_FORMAT,
    GRID_FORMAT,
    GRID_SIDE,
    NUM_COORDINATE_BINS,
    cell_token,
    coordinate_token,
)
from megavlm.data.formats.columns import BOX_PLACEHOLDER, REFERENCE_PLACEHOLDER
from megavlm.data.sample import Box, Sample, Turn
from megavlm.errors import use_error

Size = tuple[int, int]
"""Width and height in pixels."""

_PLACES = re.compile(f"({REFERENCE_PLACEHOLDER}{BOX_PLACEHOLDER}|{REFERENCE_PLACEHOLDER}|{BOX_PLACEHOLDER})")
_SLACK_PX = 1.0
"""Boxes may be outside of their image by this much: annotations are rounded."""


def write_boxes(sample: Sample, box_format: str, sizes: Sequence[Size], seen: Sequence[Size]) -> Sample:
    """The row with its boxes in its texts, where their placeholders were.

    Args:
        sample: with as many placeholders as `boxes` has names and corners.
        box_format: `data.box_format`.
        sizes: of the row's images, as their files have them.
        seen: of the row's images, as the model sees them.

    Raises:
        UseError: no format is chosen, or a box is outside of its image.
    """
    if not box_format:
        raise use_error(
            "data.box_format",
            "nothing, and a row with `objects`",
            "how the model writes boxes",
            "set data.box_format, e.g. json_1000 for Qwen3-VL, json_pixels for Qwen2.5-VL",
        )
    corners = [_scaled(box, box_format, sizes, seen) for box in sample.boxes]
    return dataclasses.replace(
        sample,
        turns=_written(sample.turns, sample.boxes, corners, box_format),
        rejected_turns=_written(sample.rejected_turns, sample.boxes, corners, box_format),
    )


def _scaled(box: Box, box_format: str, sizes: Sequence[Size], seen: Sequence[Size]) -> tuple[float, ...]:
    """Corners in the units of a format; whole numbers, but for `numbers`."""
    if box_format == "numbers" or not box.corners:
        return box.corners
    size = sizes[box.image]
    sides = size if box.unit == "real" else (1, 1)
    if any(value > sides[at % 2] + _SLACK_PX or value < -_SLACK_PX for at, value in enumerate(box.corners)):
        raise use_error(
            f"the box {list(box.corners)}",
            f"an image of {size[0]}x{size[1]} pixels",
            "corners within it, in its pixels",
            "correct the box, or set bbox_type: norm1 for shares of the sides",
        )
    scale = seen[box.image] if box_format.endswith("pixels") else (1000, 1000)
    if box_format == BIN_FORMAT:
        scale = (NUM_COORDINATE_BINS - 1, NUM_COORDINATE_BINS - 1)
    shares = tuple(min(max(value / sides[at % 2], 0.0), 1.0) for at, value in enumerate(box.corners))
    if box_format == GRID_FORMAT:
        return _cells(shares)
    return tuple(round(share * scale[at % 2]) for at, share in enumerate(shares))


def _cells(shares: tuple[float, ...]) -> tuple[int, ...]:
    """Numbers of the cells that hold a box's corners, or a point.

    A lower right corner on a border between cells belongs to the cell before it, as in Kosmos-2's processor
    (`coordinate_to_patch_index` of transformers' processing_kosmos2.py); that may not lie before the upper left one.
    """
    first = [min(math.floor(share * GRID_SIDE), GRID_SIDE - 1) for share in shares[:2]]
    last = [max(math.ceil(share * GRID_SIDE - 1), low) for share, low in zip(shares[2:], first, strict=False)]
    return tuple(y * GRID_SIDE + x for x, y in (first, last)[: len(shares) // 2])


def _written(
    turns: Sequence[Turn], boxes: Sequence[Box], corners: Sequence[tuple[float, ...]], box_format: str
) -> tuple[Turn, ...]:
    references, places = iter([box.reference for box in boxes]), iter(corners)
    return tuple(
        dataclasses.replace(turn, text="".join(_pieces(turn.text, references, places, box_format))) for turn in turns
    )


def _pieces(
    text: str, references: Iterator[str], places: Iterator[tuple[float, ...]], box_format: str
) -> Iterator[str]:
    for piece in _PLACES.split(text):
        if piece == REFERENCE_PLACEHOLDER:
            yield _reference(next(references), box_format)
        elif piece == BOX_PLACEHOLDER:
            yield _place(next(places), box_format)
        elif piece == REFERENCE_PLACEHOLDER + BOX_PLACEHOLDER:
            reference, place = next(references), next(places)
            if box_format.startswith("json"):
                kind = "bbox_2d" if len(place) == 4 else "point_2d"
                yield json.dumps({kind: place, "label": reference}, ensure_ascii=False)
            else:
                yield _reference(reference, box_format) + _place(place, box_format)
        else:
            yield piece


def _reference(reference: str, box_format: str) -> str:
    if box_format == GRID_FORMAT:
        return f"<phrase>{reference}</phrase>"
    is_marked = box_format.startswith("qwen_tokens") or box_format == BIN_FORMAT
    return f"<|object_ref_start|>{reference}<|object_ref_end|>" if is_marked else reference


def _place(place: tuple[float, ...], box_format: str) -> str:
    if box_format.startswith("qwen_tokens"):
        corners = ",".join(f"({x},{y})" for x, y in zip(place[::2], place[1::2], strict=True))
        return f"<|box_start|>{corners}<|box_end|>"
    if box_format == BIN_FORMAT:
        return f"<|box_start|>{''.join(coordinate_token(int(value)) for value in place)}<|box_end|>"
    if box_format == GRID_FORMAT:
        return f"<object>{''.join(cell_token(int(value)) for value in place)}</object>"
    return json.dumps([int(value) if float(value).is_integer() else value for value in place])
