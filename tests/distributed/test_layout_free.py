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


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layout_free")
    canon.write_inputs(root)
    rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]
    (root / "text.jsonl").write_text("\n".join(json.dumps(row) for row in rows if not row["images"]) + "\n")
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
    for world_size, parallel in LAYOUTS.values():
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
