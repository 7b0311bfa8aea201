"""Rows of the story: what is held out stays held out, answers are right, and what is better is better."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from examples.data.handwriting import QUESTIONS, answer_question
from examples.data.story_rows import Sizes, misread, sentence, text_row, write_rows
from megavlm.data.rows import Rows

SIZES = Sizes(num_images=40, num_texts=30, num_heldout=20)
KINDS = ("captions", "questions", "pairs")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, ...]]]:
    folder = tmp_path_factory.mktemp("story")
    return folder, write_rows(folder, SIZES, seed=0)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def task_of(question: str) -> str:
    (task,) = [task for task, words in QUESTIONS.items() if question == words]
    return task


def numbers_of(folder: Path, ending: str = "") -> list[str]:
    return [
        row["messages"][-1]["content"].removeprefix("the number ") for row in read(folder / f"captions{ending}.jsonl")
    ]


def test_no_digit_is_in_both(written: tuple[Path, dict[str, tuple[int, ...]]]) -> None:
    _, shown = written
    assert shown["train"] and shown["heldout"] and not set(shown["train"]) & set(shown["heldout"])


def test_the_same_seed_writes_the_same(written: tuple[Path, Any], tmp_path: Path) -> None:
    folder, shown = written
    assert write_rows(tmp_path / "again", SIZES, seed=0) == shown
    assert write_rows(tmp_path / "other", SIZES, seed=1) != shown
    for path in folder.rglob("*.*"):
        assert (tmp_path / "again" / path.relative_to(folder)).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("ending", ["", "_heldout"])
def test_every_kind_is_about_the_same_images(written: tuple[Path, Any], ending: str) -> None:
    folder, _ = written
    rows = {kind: list(Rows.open([str(folder / f"{kind}{ending}.jsonl")])) for kind in KINDS}
    number = SIZES.num_heldout if ending else SIZES.num_images
    assert {len(found) for found in rows.values()} == {number}
    for samples in zip(*rows.values(), strict=True):
        assert len({str(sample.images[0]) for sample in samples}) == 1
    for sample in rows["captions"]:
        with Image.open(str(sample.images[0])) as image:
            assert image.height in (28, 56) and 56 <= image.width <= 140


def test_held_out_captions_are_all_different(written: tuple[Path, Any]) -> None:
    numbers = numbers_of(written[0], "_heldout")
    assert len(set(numbers)) == SIZES.num_heldout
    assert {len(number) for number in numbers} == {2, 3}


def test_answers_are_right(written: tuple[Path, Any]) -> None:
    folder, _ = written
    num_sentences = num_answers = 0
    for number, row in zip(numbers_of(folder), read(folder / "questions.jsonl"), strict=True):
        turns = [message["content"].removeprefix("<image>") for message in row["messages"]]
        assert len(turns) == 6 and row["messages"][0]["content"].startswith("<image>")
        for question, said in zip(turns[::2], turns[1::2], strict=True):
            answer = answer_question(task_of(question), [number])
            assert said in (answer, sentence(answer))
            num_answers += 1
            num_sentences += said != answer
    assert 0.1 < num_sentences / num_answers < 0.5, "a word alone is what is said most"
    for number, row in zip(numbers_of(folder, "_heldout"), read(folder / "questions_heldout.jsonl"), strict=True):
        question, said = (message["content"].removeprefix("<image>") for message in row["messages"])
        assert said == answer_question(task_of(question), [number])


@pytest.mark.parametrize("ending", ["", "_heldout"])
def test_the_better_answer_is_a_right_sentence(written: tuple[Path, Any], ending: str) -> None:
    folder, _ = written
    kinds = set()
    for number, row in zip(numbers_of(folder, ending), read(folder / f"pairs{ending}.jsonl"), strict=True):
        question, chosen = (message["content"].removeprefix("<image>") for message in row["messages"])
        answer = answer_question(task_of(question), [number])
        assert chosen == sentence(answer) and row["rejected_response"] != chosen
        kinds.add("bare" if row["rejected_response"] == answer else "wrong")
    assert kinds == {"bare", "wrong"}


def test_a_misread_answer_has_one_wrong_digit() -> None:
    rng = random.Random(0)
    for answer in ("7", "42", "905"):
        found = misread(answer, rng)
        assert len(found) == len(answer) and sum(a != b for a, b in zip(found, answer, strict=True)) == 1


def test_a_typed_form_shows_its_number() -> None:
    rng = random.Random(0)
    forms = [text_row("42", rng)["messages"][0]["content"].split("D")[0] for _ in range(60)]  # type: ignore[index]
    assert all(form.count("42") == 1 and set(form) <= set("42.") for form in forms)
    assert {len(form) for form in forms} == {2, 3, 4, 6, 8}


def test_there_are_only_so_many_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_heldout=301"):
        write_rows(tmp_path, Sizes(num_heldout=301), seed=0)
