import json

import numpy as np
import pytest
from transformers.models.kosmos2.processing_kosmos2 import coordinate_to_patch_index

from megavlm.data.boxes import write_boxes
from megavlm.data.sample import Box, Sample, Turn
from megavlm.errors import UseError

SIZES, SEEN = [(200, 100), (50, 50)], [(448, 224), (56, 56)]
CATS = (Box("a cat", (10, 20, 110, 100), "real", 0), Box("two", (0.5, 0.25), "norm1", 1))


def written(answer, box_format, boxes=CATS, **fields):
    sample = Sample("r:1", (Turn("user", "Find <ref-object>."), Turn("assistant", answer)), boxes=boxes, **fields)
    return write_boxes(sample, box_format, SIZES, SEEN)


@pytest.mark.parametrize(
    ("box_format", "question", "answer"),
    [
        (
            "qwen_tokens_1000",
            "<|object_ref_start|>a cat<|object_ref_end|>",
            "<|box_start|>(50,200),(550,1000)<|box_end|>, "
            "<|object_ref_start|>two<|object_ref_end|><|box_start|>(500,250)<|box_end|>",
        ),
        (
            "qwen_tokens_pixels",
            "<|object_ref_start|>a cat<|object_ref_end|>",
            "<|box_start|>(22,45),(246,224)<|box_end|>, "
            "<|object_ref_start|>two<|object_ref_end|><|box_start|>(28,14)<|box_end|>",
        ),
        ("json_1000", "a cat", '[50, 200, 550, 1000], {"point_2d": [500, 250], "label": "two"}'),
        ("json_pixels", "a cat", '[22, 45, 246, 224], {"point_2d": [28, 14], "label": "two"}'),
        (
            "bin_tokens_1000",
            "<|object_ref_start|>a cat<|object_ref_end|>",
            "<|box_start|><|50|><|200|><|549|><|999|><|box_end|>, "
            "<|object_ref_start|>two<|object_ref_end|><|box_start|><|500|><|250|><|box_end|>",
        ),
        (
            "grid_tokens_32",
            "<phrase>a cat</phrase>",
            # rows 6 to 31, columns 1 to 17; row 8, column 16
            "<object><patch_index_0193><patch_index_1009></object>, "
            "<phrase>two</phrase><object><patch_index_0272></object>",
        ),
        ("numbers", "a cat", "[10, 20, 110, 100], two[0.5, 0.25]"),
    ],
)
def test_notations(box_format, question, answer):
    sample = written("<bbox>, <ref-object><bbox>", box_format)
    assert [turn.text for turn in sample.turns] == [f"Find {question}.", answer]
    assert sample.boxes == CATS, "what is learned of them is asked later"


def test_json_of_the_rows_own_stays_json():
    """As ms-swift's and Qwen's own grounding rows have it."""
    sample = written('[{"bbox_2d": <bbox>, "label": "<ref-object>"}]', "json_1000", CATS[:1] + (Box("a dog", ()),))
    assert json.loads(sample.turns[1].text) == [{"bbox_2d": [50, 200, 550, 1000], "label": "a dog"}]
    pair = written("<ref-object><bbox>", "json_1000", (Box("x", (0, 0, 200, 100)), Box('a "cat"', ())))
    assert json.loads(pair.turns[1].text) == {"bbox_2d": [0, 0, 1000, 1000], "label": 'a "cat"'}


def test_the_rejected_conversation_counts_anew():
    rejected = (Turn("user", "Find <ref-object>."), Turn("assistant", "<bbox>"))
    sample = written("<bbox><ref-object><bbox>", "json_1000", rejected_turns=rejected)
    assert [turn.text for turn in sample.rejected_turns] == ["Find a cat.", "[50, 200, 550, 1000]"]


def test_what_is_in_a_text_otherwise_stays():
    sample = written("<|box_start|>(1,2),(3,4)<|box_end|><box>[[1,2,3,4]]</box> <bbox>", "json_1000", CATS[:1])
    assert sample.turns[1].text == "<|box_start|>(1,2),(3,4)<|box_end|><box>[[1,2,3,4]]</box> [50, 200, 550, 1000]"


def test_cells_of_a_grid_are_those_of_kosmos_2():
    random = np.random.RandomState(0)
    corners = np.sort(random.uniform(0.001, 1, (200, 2, 2)), axis=1).reshape(200, 4).tolist()
    # on the borders of cells, of a whole image, and of one cell
    corners += [[0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.53125, 0.53125]]
    for box in corners:
        sample = written("<bbox>", "grid_tokens_32", (Box("", tuple(box), "norm1"),))
        first, last = coordinate_to_patch_index(box, 32)
        assert sample.turns[1].text == f"<object><patch_index_{first:04}><patch_index_{last:04}></object>"


def test_a_box_without_extent_is_one_cell():
    for box, cell in (((0.0, 0.0, 0.0, 0.0), 0), ((0.5, 0.5, 0.5, 0.5), 528), ((1.0, 1.0, 1.0, 1.0), 1023)):
        sample = written("<bbox>", "grid_tokens_32", (Box("", box, "norm1"),))
        assert sample.turns[1].text == f"<object><patch_index_{cell:04}><patch_index_{cell:04}></object>"


@pytest.mark.parametrize(
    ("corners", "unit", "expected"),
    [
        ((0, 0, 200.9, 100.9), "real", [0, 0, 1000, 1000]),  # rounded annotations
        ((-0.5, 0, 10, 10), "real", [0, 0, 50, 100]),
        ((0, 0, 202, 100), "real", None),
        ((0, -2, 10, 10), "real", None),
    ],
)
def test_boxes_outside_of_their_image(corners, unit, expected):
    boxes = (Box("", corners, unit),)
    if expected is None:
        with pytest.raises(UseError, match="an image of 200x100 pixels; expected corners within it"):
            written("<bbox>", "json_1000", boxes)
    else:
        assert json.loads(written("<bbox>", "json_1000", boxes).turns[1].text) == expected
