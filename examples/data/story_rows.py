"""Rows of the story: the same handwritten numbers as captions, as questions, and as pairs of answers; and text alone.

Images are those of `handwriting.py`: real ink, of which held-out rows show what no training row has shown. Every row is
in the "messages" chat format. What is written, each with its held-out rows beside it:

    captions.jsonl    an image, and what stands on it: for the contrastive chapter and for the projector's
    text.jsonl        forms that were typed, and their captions: what the language model reads before it sees
    questions.jsonl   several questions about an image, with short answers or, less often, whole sentences
    pairs.jsonl       a question with a better and a worse answer: a right sentence is better than a right word alone,
                      and better than a wrong sentence

Held-out captions are all different, so that each image has one text of its own; held-out questions stand alone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from examples.data.handwriting import (
    EXTRA_TASKS,
    QUESTIONS,
    Picture,
    answer_question,
    compose_picture,
    load_glyphs,
)

SHARE_THREE_DIGITS = 0.5
SHARE_SENTENCES = 0.3
"""Of the answers to questions. Less than half, so that a word alone is what a model says that has learned them."""
NUM_QUESTIONS = 3
TASKS = ("number", *EXTRA_TASKS)
BLANK_CELL = "."

Row = dict[str, object]


@dataclass(frozen=True)
class Sizes:
    """Numbers of rows: images (each with a caption, questions and a pair), typed forms, held-out rows of a file."""

    num_images: int = 12_000
    num_texts: int = 12_000
    num_heldout: int = 200


def caption(number: str) -> str:
    """What stands on a form."""
    return f"the number {number}"


def sentence(answer: str) -> str:
    """An answer as a whole sentence."""
    return f"It is {answer}."


CAPTION_QUESTION = "Describe the form."


def all_texts() -> list[str]:
    """Every question and wording, to train a tokenizer on."""
    return [CAPTION_QUESTION, caption("0"), sentence("0"), *(QUESTIONS[task] for task in TASKS)]


def caption_row(number: str, path: str, rng: random.Random) -> Row:
    """An image and its caption."""
    return {"messages": _turns("<image>" + CAPTION_QUESTION, caption(number)), "images": [path], "task": "caption"}


def text_row(number: str, rng: random.Random) -> Row:
    """A typed form, cell by cell as an image would show it, and its caption."""
    num_columns, num_rows = len(number) + rng.randrange(3), 1 + rng.randrange(2)
    start, line = rng.randint(0, num_columns - len(number)), rng.randrange(num_rows)
    cells = [BLANK_CELL * num_columns] * num_rows
    cells[line] = BLANK_CELL * start + number + BLANK_CELL * (num_columns - len(number) - start)
    return {"messages": _turns("".join(cells) + CAPTION_QUESTION, caption(number)), "task": "text"}


def questions_row(number: str, path: str, rng: random.Random) -> Row:
    """A conversation of several questions about an image."""
    tasks = rng.sample(TASKS, NUM_QUESTIONS)
    messages: list[dict[str, str]] = []
    for turn, task in enumerate(tasks):
        answer = answer_question(task, [number])
        said = sentence(answer) if rng.random() < SHARE_SENTENCES else answer
        messages += _turns(("<image>" if turn == 0 else "") + QUESTIONS[task], said)
    return {"messages": messages, "images": [path], "task": "questions"}


def question_row(number: str, path: str, rng: random.Random) -> Row:
    """One question about an image, with the short answer."""
    task = rng.choice(TASKS)
    answer = answer_question(task, [number])
    return {"messages": _turns("<image>" + QUESTIONS[task], answer), "images": [path], "task": task}


def pair_row(number: str, path: str, rng: random.Random) -> Row:
    """One question about an image, with a right sentence, and either the bare answer or a wrong sentence."""
    task = rng.choice(TASKS)
    answer = answer_question(task, [number])
    worse = answer if rng.random() < 0.5 else sentence(misread(answer, rng))
    return {
        "messages": _turns("<image>" + QUESTIONS[task], sentence(answer)),
        "rejected_response": worse,
        "images": [path],
        "task": task,
    }


def misread(answer: str, rng: random.Random) -> str:
    """The same answer with one digit wrong."""
    place = rng.randrange(len(answer))
    wrong = rng.choice([digit for digit in "0123456789" if digit != answer[place]])
    return answer[:place] + wrong + answer[place + 1 :]


def write_rows(out_dir: str | Path, sizes: Sizes, seed: int) -> dict[str, tuple[int, ...]]:
    """Write images and rows under `out_dir`, the same bytes for the same sizes and seed.

    Args:
        out_dir: the folder to fill; it is made when missing.
        sizes: numbers of rows.
        seed: of every choice but which scanned digits are held out, which is fixed.

    Returns:
        Of "train" and "heldout" the sorted indices of the scanned digits that are shown.

    Raises:
        ValueError: more different held-out numbers are asked for than there are.

    """
    # numbers of two digits, and as many of three as of two: 90 of the former are all there are
    if sizes.num_heldout > 300:
        raise ValueError(f"num_heldout={sizes.num_heldout}: at most 300 different numbers are drawn")
    folder = Path(out_dir)
    makers = {"captions": caption_row, "questions": questions_row, "pairs": pair_row}
    train, heldout = load_glyphs()
    rng = random.Random(f"story-train-{seed}")
    pictures = [compose_picture(train, rng, True, SHARE_THREE_DIGITS) for _ in range(sizes.num_images)]
    _write_shown(folder, "", pictures, makers, rng)
    rng = random.Random(f"story-heldout-{seed}")
    by_number: dict[str, Picture] = {}
    while len(by_number) < sizes.num_heldout:
        picture = compose_picture(heldout, rng, False, SHARE_THREE_DIGITS)
        by_number.setdefault(picture.number, picture)
    held = list(by_number.values())
    _write_shown(folder, "_heldout", held, {**makers, "questions": question_row}, rng)
    rng = random.Random(f"story-text-{seed}")
    texts = [compose_picture(train, rng, False, SHARE_THREE_DIGITS).number for _ in range(sizes.num_texts)]
    _write(folder / "text.jsonl", (text_row(number, rng) for number in texts))
    _write(folder / "text_heldout.jsonl", (text_row(picture.number, rng) for picture in held))
    return {
        name: tuple(sorted({index for one in shown for index in one.source_indices}))
        for name, shown in (("train", pictures), ("heldout", held))
    }


def _write_shown(
    folder: Path,
    ending: str,
    pictures: list[Picture],
    makers: Mapping[str, Callable[[str, str, random.Random], Row]],
    rng: random.Random,
) -> None:
    """Write the images once, and a row of every kind about each."""
    images = f"images{ending}"
    (folder / images).mkdir(parents=True, exist_ok=True)
    paths = [f"{images}/{number:06d}.png" for number in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture.pixels).save(folder / path)
    for name, make in makers.items():
        rows = (make(picture.number, path, rng) for path, picture in zip(paths, pictures, strict=True))
        _write(folder / f"{name}{ending}.jsonl", rows)


def _write(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
