"""Augmentations: what is drawn, what a row forbids, and that resumed runs and workers see the same pixels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from megavlm.data.augment import Augmentation, Draw, augmented, draw_for
from megavlm.data.dataset import Dataset
from megavlm.data.encode import SampleEncoder
from megavlm.data.image_loading import ImageLoading
from megavlm.data.image_patches import normalised
from megavlm.data.images import load_patches, read_image_spec, target_grid
from megavlm.data.loader import BatchLoader
from megavlm.data.rows import Rows
from megavlm.data.sample import Box, MicrobatchOrder, Sample, Turn
from megavlm.data.tokens import Tokenizer
from tests.pictures import photo
from tests.unit.data.conftest import QWEN_INPUTS, write_jsonl

ALL = Augmentation(crop_min_area=0.5, color_jitter=0.3, flip_probability=1.0, seed=3)


def sample(text: str = "what is it?", answer: str = "a dog", **fields: Any) -> Sample:
    return Sample("row", (Turn("user", "<image>" + text), Turn("assistant", answer)), ("x.png",), **fields)


def test_a_draw_depends_on_seed_step_row_and_image_alone() -> None:
    first = draw_for(ALL, sample(), 5, 7, 0)
    assert draw_for(ALL, sample("another text"), 5, 7, 0) == first
    others = [(4, 7, 0), (5, 8, 0), (5, 7, 1)]
    assert all(draw_for(ALL, sample(), *other) != first for other in others)
    assert draw_for(Augmentation(0.5, 0.3, 1.0, seed=4), sample(), 5, 7, 0) != first


def test_draws_stay_within_what_was_asked_for() -> None:
    draws = [draw_for(Augmentation(0.25, 0.2, 0.3), sample(), step, 0, 0) for step in range(400)]
    areas = np.array([draw.side**2 for draw in draws])
    assert 0.25 <= areas.min() < 0.3 and 0.95 < areas.max() <= 1
    for name in ("brightness", "contrast", "saturation"):
        factors = np.array([vars(draw)[name] for draw in draws])
        assert 0.8 <= factors.min() < 0.82 and 1.18 < factors.max() <= 1.2
    assert 0.2 < np.mean([draw.flip for draw in draws]) < 0.4
    assert all(0 <= draw.left < 1 and 0 <= draw.top < 1 for draw in draws)
    assert draw_for(Augmentation(), sample(), 0, 0, 0).side == 1 and not Augmentation().changes_something
    assert all(
        one.changes_something
        for one in (Augmentation(crop_min_area=0.9), Augmentation(color_jitter=0.1), Augmentation(flip_probability=0.1))
    )


@pytest.mark.parametrize(
    "text",
    [
        "which is on the left?",
        "RIGHT of it",
        "the leftmost one",
        "turn clockwise",
        "左边是什么",
        "오른쪽",
        "à gauche",
        "слева",
    ],
)
def test_rows_that_name_sides_are_not_mirrored(text: str) -> None:
    for row in (sample(text), sample(answer=text), sample(rejected_turns=(Turn("assistant", text),))):
        draw = draw_for(ALL, row, 0, 0, 0)
        assert not draw.flip and draw.side < 1


@pytest.mark.parametrize(
    "row",
    [
        sample(boxes=(Box("it", (1, 2, 3, 4)),)),
        sample(answer="<box>(1,2),(3,4)</box>"),
        sample(answer="<|box_start|>(10,20),(30,40)<|box_end|>"),
        sample(answer='[{"bbox_2d": [10, 20, 30, 40], "label": "dog"}]'),
        sample(answer="it is at [0.1, 0.25, 0.5, 0.75]"),
        sample("what is at (10, 20)?"),
    ],
)
def test_rows_with_places_are_neither_mirrored_nor_cropped(row: Sample) -> None:
    draw = draw_for(ALL, row, 0, 0, 0)
    assert not draw.flip and draw.side == 1 and draw.brightness != 1


@pytest.mark.parametrize("text", ["a bright leftover", "deportation (2019)", "[1] see", "item 3, 4 and 5"])
def test_other_texts_forbid_nothing(text: str) -> None:
    draw = draw_for(ALL, sample(text), 0, 0, 0)
    assert draw.flip and draw.side < 1


def test_pixels_of_each_part() -> None:
    image = photo(0, 200, 100)
    pixels_HWC = np.asarray(image)
    assert np.array_equal(np.asarray(augmented(image, Draw())), pixels_HWC)
    assert np.array_equal(np.asarray(augmented(image, Draw(flip=True))), pixels_HWC[:, ::-1])
    cropped = np.asarray(augmented(image, Draw(side=0.5, left=1.0, top=0.5)))
    assert np.array_equal(cropped, pixels_HWC[25:75, 100:])
    brighter = np.asarray(ImageEnhance.Brightness(image).enhance(1.2))
    assert np.array_equal(np.asarray(augmented(image, Draw(brightness=1.2))), brighter)
    for part in (Draw(brightness=1.3), Draw(contrast=0.6), Draw(saturation=0.5)):
        assert 2 < np.abs(np.asarray(augmented(image, part)).astype(int) - pixels_HWC).mean() < 60
    assert augmented(Image.new("RGB", (1, 1)), Draw(side=0.1)).size == (1, 1)


@pytest.fixture(scope="module")
def encoder(qwen_dir: Path) -> SampleEncoder:
    spec = read_image_spec(qwen_dir, QWEN_INPUTS)
    tokenizer = Tokenizer(qwen_dir, QWEN_INPUTS.image_token_id)
    return SampleEncoder(QWEN_INPUTS, spec, tokenizer, 300, loading=ImageLoading(augmentation=ALL))


def make_dataset(folder: Path, encoder: SampleEncoder) -> Dataset:
    rows = []
    for number in range(4):
        photo(number, 60 + 20 * number, 90).save(folder / f"{number}.png")
        turns = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "a house"}]
        rows.append({"messages": turns, "images": [f"{number}.png"]})
    dataset = Dataset(Rows.open([str(write_jsonl(folder / "rows.jsonl", rows))]), encoder)
    dataset.prepare()
    return dataset


def loaded(dataset: Dataset, steps: list[int], num_workers: int = 0, augment: bool = True) -> list[torch.Tensor]:
    def orders_of(step: int) -> list[MicrobatchOrder]:
        return [MicrobatchOrder((i,), ((i, 0),), step=step if augment else -1) for i in (step % 4, (step + 1) % 4)]

    loader = BatchLoader(dataset, orders_of, 4, 8, num_workers)
    patches = [normalised(one.pixels) for step in steps for one in loader.batches(step)]
    loader.close()
    return patches


def test_a_crop_is_resized_to_the_whole_images_grid(tmp_path: Path, encoder: SampleEncoder) -> None:
    path = tmp_path / "x.png"
    photo(0, 200, 130).save(path)
    spec = encoder.image_spec
    _, rows, columns = target_grid(spec, 200, 130)
    for draw in (Draw(side=0.5, left=0.2, top=0.3), Draw(side=0.99), Draw(side=0.05)):
        assert load_patches(path, spec, draw=draw).shape == (rows * columns, QWEN_INPUTS.patch_channels)


def test_the_same_pixels_for_workers_and_resumed_runs(tmp_path: Path, encoder: SampleEncoder) -> None:
    dataset = make_dataset(tmp_path, encoder)
    alone = loaded(dataset, [0, 1, 2])
    for first, second in zip(alone, loaded(dataset, [0, 1, 2], num_workers=1), strict=True):
        assert torch.equal(first, second)
    for first, second in zip(alone[4:], loaded(dataset, [2]), strict=True):
        assert torch.equal(first, second)
    # Row 1 comes at steps 0 and 1: other pixels each time; evaluation shows it as it is.
    assert not torch.equal(alone[1], alone[2])
    plain = load_patches(tmp_path / "1.png", encoder.image_spec)
    assert torch.equal(loaded(dataset, [1], augment=False)[0], plain) and not torch.equal(alone[2], plain)
