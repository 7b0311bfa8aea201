"""Emulated FP8: which layers, the same in every layout, through a resume, and what a recipe does to the loss.

FP8 rounds, and what lies near the middle between two numbers goes either way with the last bit of a sum. So layouts are
compared in the first step, where the weights are the same to the last bit.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megavlm.config.schema import Recipe
from tests import evidence
from tests.invariant import canon
from tests.invariant.layouts import layout
from tests.invariant.measure import LIMITS, StepRow, broken, distances, record
from tests.pool import PoolKeeper, WorkerError

RUNS = "tests.invariant.fp8_runs"
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
MAX_LOSS_CHANGE = 0.02
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2+SP": (2, layout(tp=2, sp=True)),
    "CP2": (2, layout(cp=2)),
    "PP2": (2, layout(pp=2)),
    "DP2": (2, {}),
    "encoder spread, PP2": (2, layout(placement="spread", pp=2)),
}
# A scale of a whole tensor is that of a context rank's own tokens, as in Transformer Engine: not for CP.
SPOTS = (
    ("tensorwise", "TP2+SP"),
    ("delayed", "TP2+SP"),
    ("delayed", "DP2"),
    ("blockwise", "TP2+SP"),
    ("blockwise", "encoder spread, PP2"),
    ("mxfp8", "CP2"),
    ("mxfp8", "PP2"),
)


def fp8_recipe(
    inputs: Path, family: str = "qwen3_vl", output_dir: Path | None = None, parallel: Any = None, **fp8: Any
) -> Recipe:
    fp8 = {"fp8_emulated_dtype": "fp32"} | fp8
    train = {"precision": "fp8_emulated"}
    data = {"eval": (str(inputs / "first.jsonl"),)}
    recipe = canon.recipe(inputs, family, train=train, fp8=fp8, parallel=parallel or {}, data=data)
    return dataclasses.replace(recipe, output_dir=str(output_dir or inputs / "runs"))


@pytest.mark.parametrize(("recipe", "name"), SPOTS)
def test_layouts_round_alike(workers: PoolKeeper, inputs: Path, recipe: str, name: str) -> None:
    world_size, parallel = LAYOUTS[name]
    run = f"{RUNS}:train_with_histories"
    ((rows, histories),) = workers(1).run(run, recipe=fp8_recipe(inputs, fp8_recipe=recipe), num_steps=1)
    found = workers(world_size).run(
        run, recipe=fp8_recipe(inputs, fp8_recipe=recipe, parallel=parallel), num_steps=1, timeout_s=300
    )
    measured = distances(found[0][0], rows)
    record(f"FP8 {recipe}, {name}, first step", measured, f"one process (FP8 {recipe})")
    assert not broken(measured)
    assert bool(histories) == (recipe == "delayed")
    for _, other in found:
        assert other.keys() == histories.keys()
        for operand, (scale, history) in histories.items():
            assert other[operand][0] == pytest.approx(scale, rel=1e-4), operand
            assert other[operand][1] == pytest.approx(history, rel=1e-4), operand


def test_a_scale_of_its_own_for_each_context_rank_shows(workers: PoolKeeper, inputs: Path) -> None:
    """What the spots above would see if ranks did not share their largest values."""
    run = f"{RUNS}:train_with_histories"
    ((rows, _),) = workers(1).run(run, recipe=fp8_recipe(inputs, fp8_recipe="tensorwise"), num_steps=1)
    found = workers(2).run(
        run, recipe=fp8_recipe(inputs, fp8_recipe="tensorwise", parallel=layout(cp=2)), num_steps=1, timeout_s=300
    )
    assert distances(found[0][0], rows)["gradient norm"] > 10 * LIMITS["gradient norm"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_follows_that_without_fp8(
    workers: PoolKeeper, inputs: Path, canonical: Callable[[str], list[StepRow]], recipe: str
) -> None:
    whole = canonical("qwen3_vl")
    ((rows, _),) = workers(1).run(
        f"{RUNS}:train_with_histories",
        recipe=fp8_recipe(inputs, fp8_recipe=recipe, fp8_amax_history_len=4, fp8_amax_compute_algo="max"),
        num_steps=canon.NUM_STEPS,
        timeout_s=300,
    )
    changes = [abs(row.loss / expected.loss - 1) for row, expected in zip(rows, whole, strict=True)]
    evidence.record(
        "precision",
        [
            evidence.row(
                f"emulated FP8 {recipe}: loss of 20 steps",
                max(changes),
                unit="largest relative difference of a step",
                required=f"<= {MAX_LOSS_CHANGE:g}",
                reference="fp32",
                reference_value=0.0,
                command="make test",
            )
        ],
    )
    assert 1e-5 < changes[0] and max(changes) <= MAX_LOSS_CHANGE
    assert rows[-1].loss < rows[0].loss - 0.3


def test_histories_survive_a_checkpoint_in_another_layout(workers: PoolKeeper, inputs: Path, tmp_path: Path) -> None:
    knobs: dict[str, Any] = {"fp8_recipe": "delayed", "fp8_amax_history_len": 3, "fp8_amax_compute_algo": "max"}
    recipe = fp8_recipe(inputs, output_dir=tmp_path, **knobs)
    ((rows, histories),) = workers(1).run(f"{RUNS}:save_and_go_on", recipe=recipe, num_before=2, num_after=2)
    assert histories and {len(history) for _, history in histories.values()} == {2}
    ((again, same),) = workers(1).run(f"{RUNS}:resume_and_go_on", recipe=recipe, num_steps=2)
    assert same == histories and again == rows
    moved = fp8_recipe(inputs, output_dir=tmp_path, parallel=layout(pp=2), **knobs)
    for _, elsewhere in workers(2).run(f"{RUNS}:resume_and_go_on", recipe=moved, num_steps=0):
        assert elsewhere == histories


def test_an_evaluation_leaves_no_trace_in_histories(workers: PoolKeeper, inputs: Path) -> None:
    recipe, run = fp8_recipe(inputs, fp8_recipe="delayed"), f"{RUNS}:train_with_histories"
    ((_, plain),) = workers(1).run(run, recipe=recipe, num_steps=1)
    ((_, evaluated),) = workers(1).run(run, recipe=recipe, num_steps=1, evaluates=True)
    assert evaluated == plain


def test_which_layers_are_in_fp8(workers: PoolKeeper, inputs: Path) -> None:
    def layers(family: str = "qwen3_vl", **fp8: Any) -> dict[str, str]:
        (found,) = workers(1).run(f"{RUNS}:layers_in_fp8", recipe=fp8_recipe(inputs, family, **fp8))
        return found

    every = layers(fp8_recipe="blockwise")
    four = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    decoder = {f"language.decoder.layers.{n}.{one}" for n in range(4) for one in four}
    tower = {f"vision.block.layers.{n}.{one}" for n in range(4) for one in four}
    projector = {name for name in every if name.startswith("projector.")}
    assert set(every) == decoder | tower | projector and len(projector) == 8  # and no output layer
    assert set(every.values()) == {"BlockScale"}

    mixed = layers(fp8_recipe="mxfp8", vit_fp8_recipe="tensorwise", aligner_fp8_recipe="none")
    assert {mixed[name] for name in decoder} == {"MXScale"} and {mixed[name] for name in tower} == {"TensorScale"}
    assert set(mixed) == decoder | tower

    ends = layers(fp8_recipe="tensorwise", first_last_layers_bf16=True, num_layers_at_end_in_bf16=2)
    assert {name.split(".")[3] for name in ends if "layers" in name} == {"1"}

    chosen = layers(fp8_recipe="tensorwise", fp8_exempt=("*.linear_fc2", "vision.block.layers.[12].*"))
    left_out = tuple(f"vision.block.layers.{n}." for n in (1, 2))
    exempt = {name for name in every if name.endswith("linear_fc2") or name.startswith(left_out)}
    assert set(every) - set(chosen) == exempt
    experts = layers("qwen3_vl_moe", fp8_recipe="delayed", vit_fp8_recipe="none", aligner_fp8_recipe="none")
    assert "language.decoder.layers.0.mlp.experts.local_experts.3.linear_fc1" in experts


def test_a_pattern_that_meets_nothing_is_an_error(workers: PoolKeeper, inputs: Path) -> None:
    with pytest.raises(WorkerError, match=r"fp8.fp8_exempt: got `\*.linear_fc3`"):
        workers(1).run(f"{RUNS}:layers_in_fp8", recipe=fp8_recipe(inputs, fp8_exempt=("*.linear_fc3",)))
