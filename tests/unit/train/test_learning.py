"""Rates by layer, what is unfrozen later, and clipping by component and layer."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megavlm.config.schema import Recipe
from tests.invariant import canon
from tests.pool import PoolKeeper
from tests.tiny import write_tiny_qwen3vl, write_tiny_qwen3vl_moe
from tests.tiny_internvl import write_tiny_internvl

CASES = "tests.unit.train.learning_cases"
PLAIN = {"use_distributed_optimizer": False}
NUM_LAYERS = 4
DECAYED = {"lr": 1e-3, "vit_lr": 2e-4, "aligner_lr": 5e-5, "min_lr": 1e-4, "lr_decay_style": "constant"} | {
    "vit_layer_decay": 0.5,
    "llm_layer_decay": 0.9,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("learning")
    write_tiny_qwen3vl(root / "qwen3_vl")
    write_tiny_qwen3vl_moe(root / "qwen3_vl_moe")
    write_tiny_internvl(root / "internvl")
    canon.write_rows(root)
    return root


def make_recipe(
    inputs: Path,
    optimizer: dict[str, Any],
    train_iters: int = 10,
    parallel: dict[str, Any] = PLAIN,
    family: str = "qwen3_vl",
    **train: Any,
) -> Recipe:
    return canon.recipe(
        inputs, family, optimizer=optimizer, train={"train_iters": train_iters} | train, parallel=parallel
    )


def depth_from_top(name: str) -> int:
    """0 above the layers, 1 in the last one, one more than layers in embeddings."""
    if ".layers." in name:
        return NUM_LAYERS - int(name.split(".layers.")[1].split(".")[0])
    below = ("language.embedding", "language.output_layer", "vision.patch_embed", "vision.position", "vision.class")
    return NUM_LAYERS + 1 if name.startswith(below) else 0


def expected_rates(name: str) -> tuple[float, float]:
    if name.startswith("projector"):
        return 5e-5, 5e-5  # the floor is not above the peak
    factor = 0.5 ** depth_from_top(name) if name.startswith("vision") else 0.9 ** depth_from_top(name)
    return (2e-4 if name.startswith("vision") else 1e-3) * factor, 1e-4 * factor


@pytest.mark.parametrize(
    ("family", "world_size", "parallel"),
    [
        ("qwen3_vl", 1, {}),
        ("qwen3_vl", 2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
        ("qwen3_vl", 2, {"pipeline_model_parallel_size": 2, "vision_placement": "spread"}),
        ("qwen3_vl_moe", 2, {"expert_model_parallel_size": 2}),
        ("internvl", 1, {}),
    ],
)
def test_rates_follow_the_global_number_of_the_layer(
    workers: PoolKeeper, inputs: Path, family: str, world_size: int, parallel: dict[str, Any]
) -> None:
    """In every layout; a tied output layer, also its copy on the last stage, has the embedding's rate."""
    recipe = make_recipe(inputs, DECAYED, parallel=PLAIN | parallel, family=family)
    ranks = workers(world_size).run(f"{CASES}:settings_by_name", recipe=recipe)
    names = set().union(*ranks)
    # of an untied model the output layer lies above the layers
    untied = {"internvl", "qwen3_vl_moe"}
    for found in ranks:
        for name, (max_lr, min_lr, first_step, unit) in found.items():
            if family in untied and name.startswith("language.output_layer"):
                assert (max_lr, min_lr) == pytest.approx((1e-3, 1e-4))
                continue
            assert (max_lr, min_lr) == pytest.approx(expected_rates(name), rel=1e-12), name
            assert first_step == 0 and unit == ""
    assert {depth_from_top(name) for name in names if name.startswith("language")} == set(range(NUM_LAYERS + 2))
    if parallel.get("pipeline_model_parallel_size") == 2:
        assert any(name.startswith("language.output_layer") for name in ranks[1])


STAGED = "0: projector, vision[-1:]; 0.2: language[2:]; 4: vision; 0.6: language"


def first_step(name: str) -> int:
    """By STAGED, in a run of 10 steps."""
    layer = NUM_LAYERS - depth_from_top(name) if ".layers." in name else None
    if name.startswith("projector"):
        return 0
    if name.startswith("vision"):
        return 0 if layer == 3 else 4
    return 2 if layer is not None and layer >= 2 else 6


def test_weights_keep_every_bit_until_their_time_and_adam_begins_then(workers: PoolKeeper, inputs: Path) -> None:
    optimizer = {"lr": 1e-3, "lr_decay_style": "constant", "clip_grad": 0.0, "adam_eps": 1e-15, "unfreeze": STAGED}
    (rows,) = workers(1).run(f"{CASES}:history", recipe=make_recipe(inputs, optimizer), num_steps=8)
    start = rows[0]
    assert {first_step(name) for name in start} == {0, 2, 4, 6}
    for name in start:
        for number, row in enumerate(rows):
            since = number + 1 - first_step(name)
            seen = row[name]
            if since <= 0:
                assert seen["digest"] == start[name]["digest"] and seen["update"] is None, (name, number)
                assert seen["steps"] == 0 and not seen["has_moments"], (name, number)
                continue
            assert seen["steps"] == since and seen["has_moments"], (name, number)
            # Adam's first step moves (nearly) everything by its rate, whatever the gradient: moments that had been
            # counted from the run's start would not.
            if since == 1 and not name.endswith(".bias"):
                assert seen["update"] == pytest.approx(1.0, abs=0.01), (name, number)


def test_rates_of_what_is_unfrozen_warm_up(workers: PoolKeeper, inputs: Path) -> None:
    optimizer = {"lr": 1e-3, "lr_decay_style": "constant", "unfreeze": "0: language; 2: projector; 3: vision"}
    recipe = make_recipe(inputs, optimizer | {"unfreeze_warmup_iters": 4, "vit_lr": 4e-4})
    (found,) = workers(1).run(f"{CASES}:rates_by_step", recipe=recipe, num_steps=8)
    for said, seen in found:
        assert {name: rate for name, rate in said.items() if rate} == pytest.approx(seen)
    logged = {name: [said[name] for said, _ in found] for name in ("language", "projector", "vision")}
    assert logged["language"] == [1e-3] * 8
    assert logged["projector"] == pytest.approx([0, 0, 2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])
    assert logged["vision"] == pytest.approx([0, 0, 0, 1e-4, 2e-4, 3e-4, 4e-4, 4e-4])


@pytest.mark.parametrize("clip_grad_by", ["total", "component", "layer"])
def test_norms_by_unit_count_what_learns(workers: PoolKeeper, inputs: Path, clip_grad_by: str) -> None:
    recipe = make_recipe(inputs, {"clip_grad_by": clip_grad_by, "unfreeze": STAGED})
    (found,) = workers(1).run(f"{CASES}:norms_of_constant", recipe=recipe, gradient=0.01, step=4)
    sizes = found["sizes"]
    units = {"total": {""}, "component": {"vision", "projector", "language"}}
    layers = {f"vision.{layer}" for layer in range(4)} | {f"language.{layer}" for layer in (2, 3)}
    assert set(sizes) == units.get(clip_grad_by, {"vision", "projector"} | layers)
    learning = {name: norm for name, norm in found["by_unit"].items() if norm > 0}
    assert learning == pytest.approx({name: 0.01 * size**0.5 for name, size in sizes.items()}, rel=1e-6)
    assert found["total"] == pytest.approx(0.01 * sum(sizes.values()) ** 0.5, rel=1e-6)
    assert sum(norm**2 for norm in found["by_component"].values()) == pytest.approx(found["total"] ** 2)


def test_an_overflow_before_its_time_skips_nothing(workers: PoolKeeper, inputs: Path) -> None:
    optimizer = {"unfreeze": "0: projector, language; 2: vision", "initial_loss_scale": 1024.0}
    recipe = make_recipe(inputs, optimizer, precision="fp16")
    assert workers(1).run(f"{CASES}:overflow_before_its_time", recipe=recipe)[0] == [False, True]


@pytest.mark.parametrize("parallel", [PLAIN, {}], ids=["plain", "distributed"])
def test_steps_of_each_group_survive_a_checkpoint(
    workers: PoolKeeper, inputs: Path, tmp_path: Path, parallel: dict[str, Any]
) -> None:
    recipe = make_recipe(inputs, {"unfreeze": STAGED}, parallel=parallel)
    recipe = dataclasses.replace(recipe, output_dir=str(tmp_path))
    workers(1).run(f"{CASES}:save_after", recipe=recipe, num_steps=5)
    plain = dataclasses.replace(recipe, parallel=dataclasses.replace(recipe.parallel, pipeline_model_parallel_size=2))
    if parallel:  # parameters of the distributed optimizer have other objects than the model's
        for steps in workers(2).run(f"{CASES}:steps_after_resume", recipe=plain):
            assert steps == {name: max(5 - first_step(name), 0) for name in steps}
    changed = dataclasses.replace(
        recipe, optimizer=dataclasses.replace(recipe.optimizer, unfreeze=STAGED.replace("4:", "3:"))
    )
    with pytest.raises(Exception, match=r"optimizer.unfreeze: got .*vision from step 3 on.*as .* was written"):
        workers(1).run(f"{CASES}:steps_after_resume", recipe=changed)
    later = dataclasses.replace(
        recipe, optimizer=dataclasses.replace(recipe.optimizer, unfreeze=STAGED.replace("0.6:", "0.9:"))
    )
    workers(1).run(f"{CASES}:steps_after_resume", recipe=later)
