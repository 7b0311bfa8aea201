import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from megavlm.config.schema import Recipe
from tests.invariant import canon
from tests.pool import PoolKeeper, WorkerError

CASES = "tests.unit.train.loss_scale_cases"
# falls from where gradients overflow, and rises every third step
KNOBS = {"initial_loss_scale": 2.0**16, "hysteresis": 1, "loss_scale_window": 3}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loss_scale")
    canon.write_inputs(root)
    return root


def recipe_of(inputs: Path, precision: str = "fp16", output_dir: Path | None = None, **sections: Any) -> Recipe:
    recipe = canon.recipe(inputs, train={"precision": precision}, **sections)
    return dataclasses.replace(recipe, output_dir=str(output_dir or inputs / "runs"))


def test_fp16_learns_what_fp32_does(workers: PoolKeeper, inputs: Path) -> None:
    (wide,) = workers(1).run(f"{CASES}:train", recipe=recipe_of(inputs, "fp32"), num_steps=6)
    small = recipe_of(inputs, optimizer={"initial_loss_scale": 64.0})  # small enough for every step
    (narrow,) = workers(1).run(f"{CASES}:train", recipe=small, num_steps=6)
    assert [row[2:] for row in narrow] == [(64.0, False)] * 6 and wide[0][2] is None
    for row, expected in zip(narrow, wide, strict=True):
        assert row[0] == pytest.approx(expected[0], rel=5e-3)
    assert narrow[0][1] == pytest.approx(wide[0][1], rel=1e-2)
    assert narrow[0][0] != wide[0][0]  # it is fp16


def test_the_scale_falls_with_overflows_and_rises_again(workers: PoolKeeper, inputs: Path) -> None:
    (rows,) = workers(1).run(f"{CASES}:train", recipe=recipe_of(inputs, optimizer=KNOBS), num_steps=16)
    scale, calm, num_rises = KNOBS["initial_loss_scale"], 0, 0
    for loss, norm, used, skipped in rows:
        assert used == scale and math.isfinite(loss)
        if skipped:
            assert norm == 0.0
            scale, calm = scale / 2, 0
            continue
        assert norm > 0
        calm += 1
        if calm == KNOBS["loss_scale_window"]:
            scale, calm, num_rises = scale * 2, 0, num_rises + 1
    assert sum(row[3] for row in rows) >= 2 and num_rises >= 2
    assert rows[0][3]


@pytest.mark.parametrize("distributed", [True, False])
def test_scale_and_skipped_steps_survive_a_checkpoint(
    workers: PoolKeeper, inputs: Path, tmp_path: Path, distributed: bool
) -> None:
    parallel = {"use_distributed_optimizer": distributed}
    recipe = recipe_of(inputs, output_dir=tmp_path, optimizer=KNOBS, parallel=parallel)
    (whole,) = workers(1).run(f"{CASES}:train", recipe=recipe, num_steps=10)
    (first,) = workers(1).run(f"{CASES}:train", recipe=recipe, num_steps=6, saves=True)
    assert first == whole[:6] and any(row[3] for row in first)
    (second,) = workers(1).run(f"{CASES}:train", recipe=recipe, num_steps=4, resumes=True)
    assert [row[2:] for row in second] == [row[2:] for row in whole[6:]]
    for row, expected in zip(second, whole[6:], strict=True):
        assert row[:2] == pytest.approx(expected[:2], rel=1e-6)
    ((updates, num_skipped),) = workers(1).run(f"{CASES}:num_updates_after_resume", recipe=recipe)
    assert updates == {6 - num_skipped} and num_skipped == sum(row[3] for row in first)
    assert 0 < num_skipped < 6
    ((unbroken, _),) = workers(1).run(f"{CASES}:num_updates", recipe=recipe, num_steps=6)
    assert unbroken == updates


def test_a_checkpoint_from_before_the_first_update(workers: PoolKeeper, inputs: Path, tmp_path: Path) -> None:
    """Both steps are skipped: there are no averages yet, and the run starts where it did."""
    recipe = recipe_of(inputs, output_dir=tmp_path, optimizer=KNOBS | {"initial_loss_scale": 2.0**30})
    (first,) = workers(1).run(f"{CASES}:train", recipe=recipe, num_steps=2, saves=True)
    assert [row[2:] for row in first] == [(2.0**30, True), (2.0**29, True)]
    (second,) = workers(1).run(f"{CASES}:train", recipe=recipe, num_steps=1, resumes=True)
    (whole,) = workers(1).run(f"{CASES}:train", recipe=recipe, num_steps=3)
    assert second == whole[2:]


def test_ranks_and_optimizers_skip_together(workers: PoolKeeper, inputs: Path) -> None:
    parallel = {"pipeline_model_parallel_size": 2, "vision_placement": "stage"}
    recipe = recipe_of(inputs, optimizer=KNOBS, parallel=parallel)
    found = workers(2).run(f"{CASES}:overflow_in_encoder", recipe=recipe, on_rank=0)
    assert found == [{"skips": True, "scales": [2.0**15, 2.0**15]}] * 2


def test_overflows_at_the_least_scale_end_the_run(workers: PoolKeeper, inputs: Path) -> None:
    knobs = KNOBS | {"min_loss_scale": 2.0**15}
    with pytest.raises(WorkerError, match="is not finite"):
        workers(1).run(f"{CASES}:train", recipe=recipe_of(inputs, optimizer=knobs), num_steps=3)
