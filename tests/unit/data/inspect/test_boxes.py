import pytest

from megavlm.data.inspect.boxes import written_boxes, wrong_boxes
from megavlm.data.sample import Box, Sample, Turn

SIZES = [(640, 480), (100, 50)]


def sample(answer: str = "there", *boxes: Box) -> Sample:
    return Sample("rows.jsonl:1", (Turn("user", "Where?"), Turn("assistant", answer)), boxes=boxes)


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("<box>[[1, 2, 3, 4]]</box>", [(1, 2, 3, 4)]),
        ("<ref>dog</ref><box>[[1,2,3,4],[0.5,6,7,8]]</box>", [(1, 2, 3, 4), (0.5, 6, 7, 8)]),
        ("<|object_ref_start|>a<|object_ref_end|><|box_start|>(10,20),(30,40)<|box_end|>", [(10, 20, 30, 40)]),
        ('[{"bbox_2d": [10, 20, 30, 40.5], "label": "cat"}]', [(10, 20, 30, 40.5)]),
        ("<box>[[-1, 2, 3, 4]]</box>", [(-1, 2, 3, 4)]),
        ("in [1, 2, 3, 4] of the book", []),
    ],
)
def test_boxes_in_texts(text: str, boxes: list[tuple[float, ...]]) -> None:
    assert list(written_boxes(text)) == boxes


@pytest.mark.parametrize(
    "text",
    [
        "<box>[[0.1, 0.2, 0.9, 1]]</box>",
        "<box>[[0, 0, 640, 480]]</box>",
        "<box>[[0, 0, 1000, 1000]]</box>",
        "<box>[[0, 0, 100, 50]]</box><box>[[10, 20, 600, 400]]</box>",
    ],
)
def test_boxes_in_texts_that_fit(text: str) -> None:
    assert wrong_boxes(sample(text), SIZES) == []


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("<box>[[0, 0, 1001, 1000]]</box>", "[0, 0, 1001, 1000]"),
        ("<box>[[-1, 0, 10, 10]]</box>", "[-1, 0, 10, 10]"),
        ("<box>[[20, 0, 10, 10]]</box>", "ends before it begins"),
        ("<|box_start|>(1,20),(30,4)<|box_end|>", "ends before it begins"),
    ],
)
def test_boxes_in_texts_that_do_not(text: str, word: str) -> None:
    (problem,) = wrong_boxes(sample(text), SIZES)
    assert word in problem


def test_larger_images_have_larger_boxes() -> None:
    text = "<box>[[0, 0, 1900, 1000]]</box>"
    assert wrong_boxes(sample(text), [(1920, 1080)]) == []
    assert len(wrong_boxes(sample(text), [(1280, 720)])) == 1


@pytest.mark.parametrize(
    ("box", "word"),
    [
        (Box("dog", (0, 0, 640, 480)), ""),
        (Box("dog", (0, 0, 641, 480)), "640 x 480 (pixels)"),
        (Box("dog", (0, 0, 101, 50), image=1), "100 x 50 (pixels)"),
        (Box("dog", (0, 0, 1, 1), "norm1", 1), ""),
        (Box("dog", (0, 0, 1.01, 1), "norm1"), "1 x 1 (shares)"),
        (Box("dog", (1, 1, 2, 2), image=2), "image 2 of 2"),
        (Box("dog", (5, 5, 4, 6)), "ends before it begins"),
        (Box("dog", (600, 470)), ""),
        (Box("dog", (600, 481)), "outside"),
        (Box("dog", (float("nan"), 1, 2, 3)), "no place"),
    ],
)
def test_objects(box: Box, word: str) -> None:
    problems = wrong_boxes(sample("there", box), SIZES)
    assert (problems == []) if not word else (word in problems[0] and "dog" in problems[0])
