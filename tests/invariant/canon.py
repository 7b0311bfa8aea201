"""The canonical run: two tiny models, rows with real images, and the recipe that every layout changes.

The models are made sensitive: with transformers' initial weights (standard deviation 0.02) the vision tower holds about
a thousandth of the gradient, and a fault in it would drown. Here tower and projector have a good share of it. But not
so sensitive that rounding alone, which differs between processors, would move the run (`test_conditioning.py`).
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file, save_file

from megavlm.config.schema import (
    CheckpointConfig,
    CurriculumPhase,
    DataConfig,
    MixtureSource,
    ModelConfig,
    ObserveConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    TrainConfig,
)
from tests.invariant.references import Reference

NUM_STEPS = 20
NUM_ROWS = 24
GLOBAL_BATCH_SIZE = 8
FULL_MATRIX = os.environ.get("MEGAVLM_FULL_MATRIX") == "1"

# The model with tokens for coordinates, and how rows with boxes are written for it.
BOXES, BOX_FORMAT = "qwen3_vl_boxes", "bin_tokens_1000"
# Models with a token for masks.
MASKS = ("qwen3_vl_masks", "llava_masks")

# Factors on the matrices of a model: by what a tensor's name contains, the first match counts.
SENSITIVITY: dict[str, dict[str, float]] = {
    "qwen3_vl": {"merger": 5.0, "visual": 2.0, "embed_tokens": 4.0, "layers": 4.0},
    "qwen3_vl_moe": {"merger": 5.0, "visual": 2.0, "lm_head": 4.0, "layers": 4.0},
    "llava": {"multi_modal_projector": 5.0, "vision": 2.0, "lm_head": 4.0, "layers": 4.0},
    "llava_next": {"multi_modal_projector": 5.0, "vision": 2.0, "lm_head": 4.0, "layers": 3.0},
    "llava_onevision": {"multi_modal_projector": 5.0, "vision": 2.0, "embed_tokens": 4.0, "layers": 4.0},
    "qwen2_5_vl": {"merger": 5.0, "visual": 1.5, "embed_tokens": 4.0, "layers": 5.0},
    "internvl": {"multi_modal_projector": 5.0, "lm_head": 4.0, "language_model": 6.0},
    "internvl_6b": {"multi_modal_projector": 5.0, "lm_head": 4.0, "language_model": 6.0},
    "perceiver": {"language_model": 4.0},
    "gated_cross_attention": {"language_model": 4.0, "gated_layers": 2.0},
    "qformer": {"cross_attention": 2.0, "language_model": 5.0},
}

_WORDS = "a red square and the blue circle over brown fox dog largest number digits in this image".split()


def write_inputs(root: Path) -> None:
    """Write the models `root`/<family>, the images, and the rows `root`/rows.jsonl."""
    from tests.parity.composed import ComposedReference
    from tests.tiny import write_tiny_llava, write_tiny_qwen3vl, write_tiny_qwen3vl_moe
    from tests.tiny_anyres import write_tiny_llava_next, write_tiny_llava_onevision
    from tests.tiny_boxes import write_tiny_boxes
    from tests.tiny_internvl import write_tiny_internvl, write_tiny_internvl_6b
    from tests.tiny_masks import add_segment_token
    from tests.tiny_qwen2_5_vl import write_tiny_qwen2_5_vl

    writers = {
        "qwen3_vl": write_tiny_qwen3vl,
        "qwen3_vl_moe": write_tiny_qwen3vl_moe,
        "llava": write_tiny_llava,
        "llava_next": write_tiny_llava_next,
        "llava_onevision": write_tiny_llava_onevision,
        "qwen2_5_vl": write_tiny_qwen2_5_vl,
        "internvl": write_tiny_internvl,
        "internvl_6b": write_tiny_internvl_6b,
    }
    for family, write in writers.items():
        _sharpen(write(root / family), SENSITIVITY[family])
    _sharpen(write_tiny_boxes(root / BOXES), SENSITIVITY["qwen3_vl"])
    for name in MASKS:
        family = name.removesuffix("_masks")
        _sharpen(add_segment_token(writers[family](root / name)), SENSITIVITY[family])
    for kind in ("perceiver", "qformer", "gated_cross_attention"):
        _sharpen(ComposedReference(kind).write(root / kind), SENSITIVITY[kind])
    write_rows(root)


def write_rows(root: Path) -> None:
    """Write the images and rows, in several files."""
    from tests.tiny_boxes import with_boxes
    from tests.tiny_masks import with_masks

    random = np.random.RandomState(7)
    rows = [_row(root, number, random) for number in range(NUM_ROWS)]
    random = np.random.RandomState(11)
    pairs = [_pair(row, number, random) for number, row in enumerate(rows)]
    parts = {"rows": rows, "first": rows[:5], "second": rows[5:16], "third": rows[16:], "pairs": pairs}
    random = np.random.RandomState(13)
    parts["boxes"] = [with_boxes(row, number, random) for number, row in enumerate(rows)]
    random = np.random.RandomState(17)
    parts["masks"] = [with_masks(row, root, number, random) for number, row in enumerate(rows)]
    parts["captions"] = [row for row in rows if row["images"]]
    parts["marked"] = [row | {"label": number % 3 != 1} for number, row in enumerate(rows)]
    random = np.random.RandomState(13)
    parts["steps"] = [_in_steps(row, random) for row in rows]
    for name, part in parts.items():
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)) + "\n")


def _sharpen(folder: Path, factors: dict[str, float]) -> None:
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        factor = next((factor for part, factor in factors.items() if part in name), 1.0)
        if tensor.ndim > 1:
            tensor.mul_(factor)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _row(root: Path, number: int, random: np.random.RandomState) -> dict[str, Any]:
    """0, 1 or 2 images; an answer of 3 to 12 words; every fifth row has two answers, every fourth weighs less."""
    images = []
    for place in range(number % 3):
        height_px, width_px = random.randint(30, 110, 2)
        pixels = random.randint(0, 256, (height_px, width_px, 3)).astype(np.uint8)
        images.append(f"{number}_{place}.png")
        Image.fromarray(pixels).save(root / images[-1])

    def words(count: int) -> str:
        return " ".join(random.choice(_WORDS, count))

    answer: dict[str, Any] = {"role": "assistant", "content": words(random.randint(3, 13))}
    if number % 4 == 0:
        answer["loss_scale"] = 0.5
    turns = [{"role": "user", "content": "<image>" * len(images) + words(random.randint(2, 9))}, answer]
    if number % 5 == 0:
        turns += [{"role": "user", "content": words(3)}, {"role": "assistant", "content": words(4)}]
    return {"messages": turns, "images": images}


def _pair(row: dict[str, Any], number: int, random: np.random.RandomState) -> dict[str, Any]:
    """The same row with a worse answer of another length, and every sixth with other images in the worse one."""
    words = " ".join(random.choice(_WORDS, random.randint(2, 15)))
    pair = row | {"rejected_response": words, "margin": 0.1 * (number % 4)}
    if number % 6 == 1:
        pair["rejected_images"] = ["2_0.png"] * len(row["images"])
    return pair


def _in_steps(row: dict[str, Any], random: np.random.RandomState) -> dict[str, Any]:
    """The question of a row, answered in one to five steps, of which some are wrong."""
    steps = [" ".join(random.choice(_WORDS, random.randint(1, 6))) for _ in range(random.randint(1, 6))]
    labels = [bool(random.randint(3)) for _ in steps]
    return {"prompt": row["messages"][:1], "completions": steps, "labels": labels, "images": row["images"]}


def mixed_rows(root: Path) -> dict[str, Any]:
    """The same rows as three sources whose weights change twice, once before and once after a resume at half-time."""
    sources = (
        MixtureSource("first", (str(root / "first.jsonl"),), 3.0),
        MixtureSource("second", (str(root / "second.jsonl"),), 1.0),
        MixtureSource("third", (str(root / "third.jsonl"),), 0.5),
    )
    phases = (
        CurriculumPhase(max_length=90, order="length"),
        CurriculumPhase(start_iters=6),
        CurriculumPhase(start_fraction=0.7, weights=(0.0, 2.0, 1.0)),
    )
    return {"train": (), "mixture": sources, "mixture_temperature": 2.0, "curriculum": phases}


def tasks_of_sources(root: Path) -> dict[str, Any]:
    """The same rows as three tasks of unlike size, without phases."""
    sources = tuple(MixtureSource(name, (str(root / f"{name}.jsonl"),)) for name in ("first", "second", "third"))
    return {"train": (), "mixture": sources}


def recipe(root: Path, family: str = "qwen3_vl", **changes: dict[str, Any]) -> Recipe:
    """The canonical recipe with changes by section, e.g. `parallel={"pipeline_model_parallel_size": 2}`."""
    canonical = Recipe(
        name="canonical",
        output_dir=str(root / "runs"),
        model=ModelConfig(hf_dir=str(root / family)),
        parallel=ParallelConfig(),
        data=DataConfig(train=(str(root / "rows.jsonl"),)),
        train=TrainConfig(
            train_iters=NUM_STEPS, precision="fp32", micro_batch_size=1, global_batch_size=GLOBAL_BATCH_SIZE
        ),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1, clip_grad=1.0),
        checkpoint=CheckpointConfig(save_timeout_s=100),
        observe=ObserveConfig(tensorboard=False, progress=False, report=False),
    )
    sections = {name: dataclasses.replace(vars(canonical)[name], **values) for name, values in changes.items()}
    return dataclasses.replace(canonical, **sections)


def recipe_of(root: Path, reference: Reference, **changes: dict[str, Any]) -> Recipe:
    """The canonical recipe of a single-process run, with changes by section."""
    sections: dict[str, dict[str, Any]] = {
        "optimizer": reference.optimizer,
        "model": reference.model,
        "train": {"stage": reference.stage},
        "data": mixed_rows(root) if reference.mixed else {},
    } | reference.objective
    if "task_weighting" in reference.objective.get("sft", {}):
        sections["data"] = tasks_of_sources(root)
    if reference.family == BOXES:
        sections["data"] = {"train": (str(root / "boxes.jsonl"),), "box_format": BOX_FORMAT}
    if reference.family in MASKS:
        sections["data"] = {"train": (str(root / "masks.jsonl"),)}
    if reference.stage != "sft":
        special = {"kto": "marked", "prm": "steps", "contrastive": "captions", "matching": "captions"}
        sections["data"] = {"train": (str(root / f"{special.get(reference.stage, 'pairs')}.jsonl"),)}
    for name, values in changes.items():
        sections[name] = sections.get(name, {}) | values
    return recipe(root, reference.family, **sections)
