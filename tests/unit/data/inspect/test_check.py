import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megavlm.data.encode import open_encoder
from megavlm.data.inspect.check import CheckReport, check_rows
from megavlm.data.inspect.rows import open_rows
from megavlm.data.inspect.write_rows import write_rows
from tests.unit.data.conftest import QWEN_INPUTS
from tests.unit.data.inspect.conftest import chat, photo

Write = Callable[[list[Any]], str]


def check(path: str, **options: Any) -> CheckReport:
    return check_rows(open_rows([path]), **options)


def test_good_rows_pass(folder: Write) -> None:
    rows = [chat(f"Question {number}?", "yes", f"{number}.png") for number in range(10)]
    rows.append(chat("The same image, another question?", "yes", "0.png"))
    report = check(folder(rows))
    assert report.counts() == {}
    assert report.passing == tuple(range(11)) and report.num_images == 10


TURN = {"role": "user", "content": "Well?"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"messages": [', "broken_json"),
        ({"messages": [TURN, TURN]}, "turn_order"),
        ({"messages": [TURN]}, "turn_order"),
        (chat("Well?", "  "), "empty_answer"),
        (chat("Well?", "yes", "nowhere.png"), "missing_image"),
        (chat("Well?", "yes", "cut.png"), "broken_image"),
        (chat("Well?", "yes", "text.png"), "broken_image"),
        (chat("Well?", "<box>[[0, 0, 2000, 10]]</box>", "1.png"), "box_out_of_range"),
        (chat("First?", "yes", "0.png"), "repeated_row"),
        ({"messages": "no list"}, "other"),
    ],
)
def test_a_mistake_is_found_and_only_that_row_fails(folder: Write, tmp_path: Path, row: Any, reason: str) -> None:
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "text.png").write_text("no image")
    report = check(folder([chat("First?", "yes", "0.png"), row, chat("Last?", "yes", "3.png")]))
    assert report.counts() == {reason: 1}
    assert report.passing == (0, 2)
    (finding,) = report.findings
    assert finding.row == 1 and "rows.jsonl" in finding.message


def test_images_that_are_alike_are_remarked_on(folder: Write, tmp_path: Path) -> None:
    shutil.copy(tmp_path / "0.png", tmp_path / "copy.png")
    photo(1).save(tmp_path / "compressed.jpg", quality=70)
    photo(2).resize((224, 112), Image.Resampling.BICUBIC).save(tmp_path / "large.png")
    names = ["0.png", "1.png", "2.png", "3.png", "copy.png", "compressed.jpg", "large.png"]
    report = check(folder([chat(f"Question {name}?", "yes", name) for name in names]))
    assert [(finding.row, finding.reason) for finding in report.findings] == [
        (4, "duplicate_image"),
        (5, "near_duplicate_image"),
        (6, "near_duplicate_image"),
    ]
    assert report.findings[1].message.endswith(f"{tmp_path}/1.png")
    assert report.passing == tuple(range(7))


def test_processes_find_the_same(folder: Write, tmp_path: Path) -> None:
    for number in range(10, 80):
        photo(number).save(tmp_path / f"{number}.png")
    (tmp_path / "70.png").write_bytes(b"nothing")
    path = folder([chat(f"Question {number}?", "yes", f"{number}.png") for number in range(80)])
    assert check(path, nproc=2) == check(path)
    assert check(path).counts() == {"broken_image": 1}


def test_what_the_model_says(folder: Write, qwen_dir: Path) -> None:
    encoder = open_encoder(qwen_dir, QWEN_INPUTS, max_length=60)
    path = folder(
        [
            chat("Well?", "yes", "0.png"),
            chat("Well, <|image_pad|>?", "yes"),
            chat("word " * 100, "yes"),
            {"messages": [TURN, {"role": "assistant", "content": "no", "loss": False}]},
        ]
    )
    report = check(path, encoder=encoder)
    found = [(finding.row, finding.reason) for finding in report.findings]
    assert found == [(1, "does_not_encode"), (2, "too_long"), (3, "nothing_to_learn")]
    assert report.passing == (0, 2, 3)


def test_rows_that_training_would_cut(folder: Write, qwen_dir: Path) -> None:
    turns = [TURN, {"role": "assistant", "content": "no"}, TURN, {"role": "assistant", "content": "word " * 60}]
    path = folder([{"messages": turns}])
    for rule, reason in (("cut_turns", "cut"), ("drop", "too_long")):
        report = check(path, encoder=open_encoder(qwen_dir, QWEN_INPUTS, max_length=60, too_long=rule))
        assert report.counts() == {reason: 1} and report.passing == (0,)


def test_clean_rows_are_the_same_rows(folder: Write, tmp_path: Path) -> None:
    llava = {
        "id": 7,
        "image": "4.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "four"}],
    }
    rows = [chat("First?", "yes", "0.png", task="number"), '{"broken', llava, chat("Text?", "only")]
    samples = open_rows([folder(rows)])
    for out in (tmp_path / "clean.jsonl", tmp_path / "elsewhere" / "clean.jsonl"):
        assert write_rows((samples[row] for row in check_rows(samples).passing), out) == 3
        again = open_rows([str(out)])
        for row, before in zip(again, (samples[0], samples[2], samples[3]), strict=True):
            assert (row.turns, row.images, row.extra) == (before.turns, before.images, before.extra)
    lines = (tmp_path / "clean.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["images"] == ["0.png"] and json.loads(lines[0])["task"] == "number"
