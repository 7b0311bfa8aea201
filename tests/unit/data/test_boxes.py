import json

import pytest

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
