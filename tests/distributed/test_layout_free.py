"""Evaluation, and batches without any image, under several layouts."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.invariant import canon
from tests.pool import PoolKeeper

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2+SP x PP2": (
        4,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2},
    ),
    "PP2 x VPP2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "CP2": (2, {"context_parallel_size": 2}),
    "DP2, overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
}


PLACEMENTS: dict[str, tuple[int, dict[str, Any]]] = {
    "stage": (2, {"pipeline_model_parallel_size": 2, "vision_placement": "stage"}),
    "spread": (2, {"vision_placement": "spread"}),
    "bubble, PP2 x VPP2": (
        2,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2, "vision_placement": "bubble"},
    ),
    "own ranks": (2, {"vision_placement": "own_ranks"}),
    "own ranks, DP2": (3, {"vision_placement": "own_ranks"}),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layout_free")
    canon.write_inputs(root)
    rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]
    (root / "text.jsonl").write_text("\n".join(json.dumps(row) for row in rows if not row["images"]) + "\n")
    texts = [row for row in rows if not row["images"]]
    images = [row for row in rows if row["images"]]
    assert len(texts) == canon.GLOBAL_BATCH_SIZE
    mixed = texts + images[: canon.GLOBAL_BATCH_SIZE]
    (root / "mixed.jsonl").write_text("\n".join(map(json.dumps, mixed)) + "\n")
    # an odd number, so that data ranks and interleaved stages need fillers
    (root / "heldout.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:7]) + "\n")
    return root


@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_evaluation_does_not_depend_on_the_layout(inputs: Path, workers: PoolKeeper, family: str) -> None:
    def evaluated(world_size: int, parallel: dict[str, Any]) -> dict[str, float]:
        data = {"eval": (str(inputs / "heldout.jsonl"),)}
        recipe = canon.recipe(inputs, family, parallel=parallel, data=data, train={"micro_batch_size": 2})
        results = workers(world_size).run("tests.distributed.layout_cases:evaluation", recipe=recipe)
        assert all(result == results[0] for result in results)
        return results[0]

    expected = evaluated(1, {})
    for world_size, parallel in [*LAYOUTS.values(), *PLACEMENTS.values()]:
        values = evaluated(world_size, parallel)
        assert values["num_tokens"] == expected["num_tokens"]
        assert values["loss"] == pytest.approx(expected["loss"], rel=1e-6)


@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_batches_without_images(inputs: Path, workers: PoolKeeper, family: str) -> None:
    def trained(world_size: int, parallel: dict[str, Any]) -> list[float]:
        recipe = canon.recipe(inputs, family, parallel=parallel, data={"train": (str(inputs / "text.jsonl"),)})
        # weight decay alone would still move the encoder, and its gradient buffers must be filled, not skipped
        recipe = dataclasses.replace(recipe, optimizer=dataclasses.replace(recipe.optimizer, weight_decay=0.0))
        results = workers(world_size).run("tests.distributed.layout_cases:text_only_steps", recipe=recipe, num_steps=3)
        assert [odd for _, odd in results] == [[]] * world_size
        assert all(losses == results[0][0] for losses, _ in results)
        return results[0][0]

    expected = trained(1, {})
    assert expected[-1] < expected[0]
    for world_size, parallel in LAYOUTS.values():
        assert trained(world_size, parallel) == pytest.approx(expected, rel=1e-5)


def test_a_step_without_images_in_every_place_of_the_encoder(inputs: Path, workers: PoolKeeper) -> None:
    """The first global batch is text alone, the second has images in every row."""

    def trained(world_size: int, parallel: dict[str, Any]) -> list[tuple[float, int]]:
        data = {"train": (str(inputs / "mixed.jsonl"),), "shuffle": False}
        recipe = canon.recipe(inputs, parallel=parallel, data=data)
        results = workers(world_size).run(
            "tests.distributed.layout_cases:losses_and_images", recipe=recipe, num_steps=3
        )
        assert all(result == results[0] for result in results)
        return results[0]

    expected = trained(1, {})
    assert [num_images > 0 for _, num_images in expected] == [False, True, False]
    for world_size, parallel in PLACEMENTS.values():
        found = trained(world_size, parallel)
        assert [number for _, number in found] == [number for _, number in expected]
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-5)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_rows_without_any_image_are_refused(inputs: Path, workers: PoolKeeper, name: str) -> None:
    world_size, parallel = PLACEMENTS[name]
    recipe = canon.recipe(inputs, parallel=parallel, data={"train": (str(inputs / "text.jsonl"),)})
    for said in workers(world_size).run("tests.distributed.layout_cases:build_error", recipe=recipe):
        assert "parallel.vision_placement: got" in said and "no image at all" in said


def test_each_rank_holds_its_part_only(inputs: Path, workers: PoolKeeper) -> None:
    expected = {
        "stage": [["projector", "vision"], ["language"]],
        "spread": [["language", "projector", "vision"]] * 2,
        "own ranks, DP2": [["projector", "vision"], ["language"], ["language"]],
    }
    for name, held in expected.items():
        world_size, parallel = PLACEMENTS[name]
        found = workers(world_size).run(
            "tests.distributed.layout_cases:held_components", recipe=canon.recipe(inputs, parallel=parallel)
        )
        assert found == held, name
