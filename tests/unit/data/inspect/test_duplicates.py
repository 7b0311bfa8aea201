import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megavlm.data.inspect.duplicates import find_duplicates
from megavlm.data.inspect.rows import open_rows
from megavlm.errors import UseError
from tests.unit.data.inspect.conftest import chat, photo

Write = Callable[[list[Any]], str]
LONG = "a large red square stands to the left of a small blue circle on a table of old wood in the evening"


def dropped(path: str, **options: Any) -> list[tuple[int, str]]:
    report = find_duplicates(open_rows([path]), **options)
    assert sorted([*report.kept, *(one.row for one in report.dropped)]) == list(range(report.num_rows))
    return [(one.row, one.kept.rpartition(":")[2]) for one in report.dropped]


@pytest.fixture
def path(folder: Write, tmp_path: Path) -> str:
    shutil.copy(tmp_path / "0.png", tmp_path / "copy.png")
    photo(0).save(tmp_path / "small.jpg", quality=70)
    return folder(
        [
            chat("What?", "two", "0.png"),  # 1
            chat("What?", "two", "1.png"),  # 2: another image
            chat("What?", "two", "copy.png"),  # 3: the same bytes
            chat("what", "Two!", "small.jpg"),  # 4: looks the same, nearly the same text
            chat("Who?", "me", "0.png"),  # 5: the same image, another text
            chat("Text only?", "yes"),  # 6
            chat("Text only?", "yes"),  # 7: the same
            chat("Text  ONLY", "yes"),  # 8: nearly
        ]
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(2, "1"), (3, "1"), (6, "6"), (7, "6")]),
        ({"exact": True}, [(2, "1"), (6, "6")]),
        ({"by": "image"}, [(2, "1"), (3, "1"), (4, "1")]),
        ({"by": "image", "exact": True}, [(2, "1"), (4, "1")]),
        ({"by": "text"}, [(1, "1"), (2, "1"), (3, "1"), (6, "6"), (7, "6")]),
        ({"by": "text", "exact": True}, [(1, "1"), (2, "1"), (6, "6")]),
    ],
)
def test_the_first_is_kept(path: str, options: dict[str, Any], expected: list[tuple[int, str]]) -> None:
    assert dropped(path, **options) == expected


def test_texts_that_overlap(folder: Write) -> None:
    rows = [
        chat("Describe.", LONG),
        chat("Describe.", LONG.replace("evening", "morning")),
        chat("Describe.", " ".join(reversed(LONG.split()))),
        chat("Describe.", LONG.replace("evening", "morning"), "0.png"),
    ]
    assert dropped(folder(rows)) == []
    assert dropped(folder(rows), min_similarity=0.8) == [(1, "1")]
    assert dropped(folder(rows), min_similarity=0.8, by="text") == [(1, "1"), (3, "1")]


def test_the_order_of_images_counts(folder: Write) -> None:
    rows = [chat("Which?", "one", "0.png", "1.png"), chat("Which?", "one", "1.png", "0.png")]
    assert dropped(folder(rows)) == []


def test_rows_that_cannot_be_read_are_named(folder: Write) -> None:
    report = find_duplicates(open_rows([folder([chat("What?"), {"messages": 3}, chat("What?")])]))
    assert report.kept == (0,) and [one.row for one in report.dropped] == [2]
    assert len(report.problems) == 1 and "row 2" in report.problems[0]


@pytest.mark.parametrize("similarity", [0.0, 1.5])
def test_similarities_out_of_range(path: str, similarity: float) -> None:
    with pytest.raises(UseError, match="--min-similarity"):
        dropped(path, min_similarity=similarity)
