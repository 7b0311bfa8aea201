import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from megavlm.config.schema import Recipe
from tests.invariant import canon
from tests.pool import PoolKeeper

CASES = "tests.unit.train.optim_cases"
PLAIN = {"use_distributed_optimizer": False}
# peaks: language 1e-3, vision 2e-4, projector 5e-5; the floor 1e-4 is lowered to the projector's peak
RATES = {"lr": 1e-3, "vit_lr": 2e-4, "aligner_lr": 5e-5, "min_lr": 1e-4}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("optim")
    canon.write_inputs(root)
    return root


def make_recipe(
    inputs: Path, optimizer: dict[str, Any], train_iters: int = 10, parallel: dict[str, Any] | None = None
) -> Recipe:
    return canon.recipe(inputs, optimizer=optimizer, train={"train_iters": train_iters}, parallel=parallel or {})


def rates_of(workers: PoolKeeper, inputs: Path, num_steps: int = 12, **optimizer: Any) -> list[dict[str, float]]:
    recipe = make_recipe(inputs, RATES | optimizer)
    return workers(1).run(f"{CASES}:rates_by_step", recipe=recipe, num_steps=num_steps)[0]


@pytest.mark.parametrize(
    ("style", "knobs", "language"),
    [
        # steps 0 to 11 of a run of 10: warm-up over 2 steps, then by hand; the floor after the end
        (
            "cosine",
            {"lr_warmup_iters": 2},
            [0, 5e-4, 1e-3] + [5.5e-4 + 4.5e-4 * math.cos(math.pi * k / 8) for k in range(1, 8)] + [1e-4, 1e-4],
        ),
        (
            "linear",
            {"lr_warmup_iters": 2},
            [0, 5e-4, 1e-3, 8.875e-4, 7.75e-4, 6.625e-4, 5.5e-4, 4.375e-4, 3.25e-4, 2.125e-4, 1e-4, 1e-4],
        ),
        ("linear", {"lr_warmup_fraction": 0.11}, [0, 5e-4, 1e-3, 8.875e-4]),  # rounded up to 2 steps
        ("constant", {"lr_warmup_iters": 4}, [0, 2.5e-4, 5e-4, 7.5e-4] + [1e-3] * 8),
        ("constant", {}, [1e-3] * 12),
        (
            "WSD",
            {"lr_warmup_iters": 2, "lr_wsd_decay_iters": 4},
            [0, 5e-4, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 7.75e-4, 5.5e-4, 3.25e-4, 1e-4, 1e-4],
        ),
    ],
)
def test_schedule(workers: PoolKeeper, inputs: Path, style: str, knobs: dict[str, Any], language: list[float]) -> None:
    rates = rates_of(workers, inputs, len(language), lr_decay_style=style, **knobs)
    assert [rate["language"] for rate in rates] == pytest.approx(language, rel=1e-9, abs=1e-15)


def test_components_have_rates_and_floors_of_their_own(workers: PoolKeeper, inputs: Path) -> None:
    rates = rates_of(workers, inputs, 11, lr_decay_style="linear", lr_warmup_iters=2)
    assert [rates[step]["vision"] for step in (0, 1, 2, 6, 10)] == pytest.approx([0, 1e-4, 2e-4, 1.5e-4, 1e-4])
    assert [rates[step]["projector"] for step in (0, 1, 2, 6, 10)] == pytest.approx([0, 2.5e-5, 5e-5, 5e-5, 5e-5])


def test_components_without_a_rate_take_the_language_models(workers: PoolKeeper, inputs: Path) -> None:
    rates = rates_of(workers, inputs, 3, vit_lr=-1.0, aligner_lr=-1.0, lr_decay_style="constant")
    assert rates == [dict.fromkeys(("vision", "projector", "language"), 1e-3)] * 3


def test_a_rate_of_zero_is_not_the_default(workers: PoolKeeper, inputs: Path) -> None:
    rates = rates_of(workers, inputs, 2, vit_lr=0.0, lr_decay_style="constant")
    assert [rate["vision"] for rate in rates] == [0.0, 0.0]


def test_what_is_frozen_has_no_rate(workers: PoolKeeper, inputs: Path) -> None:
    rates = rates_of(workers, inputs, 1, vit_lr=-1.0, freeze_vit=True, lr_decay_style="constant")
    assert list(rates[0]) == ["projector", "language"]


@pytest.mark.parametrize("parallel", [PLAIN, {}], ids=["plain", "distributed"])
def test_matrices_decay_with_their_rate_and_one_dimensional_parameters_do_not(
    workers: PoolKeeper, inputs: Path, parallel: dict[str, Any]
) -> None:
    optimizer = RATES | {"lr_decay_style": "constant", "weight_decay": 0.5}
    recipe = make_recipe(inputs, optimizer, parallel=parallel)
    (ratios,) = workers(1).run(f"{CASES}:decay_without_gradient", recipe=recipe)
    for component, rate in (("vision", 2e-4), ("projector", 5e-5), ("language", 1e-3)):
        assert {dimensions for dimensions, _, _ in ratios[component]} == {1, 2}
        for dimensions, least, largest in ratios[component]:
            expected = 1.0 if dimensions == 1 else 1 - rate * 0.5
            # fp32 weights hold seven digits
            assert least == pytest.approx(expected, abs=2e-7) and largest == pytest.approx(expected, abs=2e-7)


@pytest.mark.parametrize(
    ("clip_grad", "gradient", "is_clipped"), [(1.0, 0.01, True), (1.0, 1e-5, False), (0.0, 0.01, False)]
)
def test_clipping(workers: PoolKeeper, inputs: Path, clip_grad: float, gradient: float, is_clipped: bool) -> None:
    recipe = make_recipe(inputs, {"clip_grad": clip_grad}, parallel=PLAIN)
    (found,) = workers(1).run(f"{CASES}:clipping", recipe=recipe, gradient=gradient)
    expected = {name: gradient * size**0.5 for name, size in found["sizes"].items()}
    assert found["by_component"] == pytest.approx(expected, rel=1e-6)
    total = gradient * sum(found["sizes"].values()) ** 0.5
    assert found["total"] == pytest.approx(total, rel=1e-6)
    assert (total > clip_grad > 0) == is_clipped
    assert found["left"] == pytest.approx(clip_grad if is_clipped else total, rel=1e-5)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_groups_and_moments_survive_a_checkpoint(
    workers: PoolKeeper, inputs: Path, tmp_path: Path, pipeline: int
) -> None:
    """Also into a pipeline, where the last rank holds neither tower nor projector."""
    optimizer = RATES | {"lr_decay_style": "linear", "lr_warmup_iters": 2}

    def recipe_with(parallel: dict[str, Any]) -> Recipe:
        return dataclasses.replace(make_recipe(inputs, optimizer, parallel=parallel), output_dir=str(tmp_path))

    saved = workers(1).run(f"{CASES}:groups_after_steps", recipe=recipe_with(PLAIN), num_steps=3)[0]
    groups, moments, loss = saved
    assert len(groups) == 6  # three components, with and without decay
    assert {name: group["step"] for name, group in groups.items()} == dict.fromkeys(groups, 3)
    assert sorted(group["lr"] for group in groups.values()) == pytest.approx(
        [5e-5, 5e-5, 1.875e-4, 1.875e-4, 8.875e-4, 8.875e-4]
    )
    parallel = PLAIN | {"pipeline_model_parallel_size": pipeline}
    resumed = workers(pipeline).run(f"{CASES}:groups_after_resume", recipe=recipe_with(parallel))
    names: set[str] = set()
    for rank_groups, rank_moments, rank_loss, folder in resumed:
        assert folder == tmp_path / "canonical" / "checkpoints" / "step_00000003"
        assert set(rank_groups) == set(groups)
        for name, group in rank_groups.items():
            assert {key: group[key] for key in ("lr", "max_lr", "min_lr", "weight_decay")} == {
                key: groups[name][key] for key in ("lr", "max_lr", "min_lr", "weight_decay")
            }
        for name, moment in rank_moments.items():
            if name in moments:  # a tied output layer has a name of its own
                assert moment.equal(moments[name]), name
        names |= set(rank_moments)
        assert rank_loss == pytest.approx(loss, rel=1e-6)
    assert names >= set(moments)


def test_a_resumed_run_takes_the_rates_of_its_own_recipe(workers: PoolKeeper, inputs: Path, tmp_path: Path) -> None:
    def recipe_with(optimizer: dict[str, Any]) -> Recipe:
        recipe = make_recipe(inputs, RATES | {"lr_decay_style": "constant"} | optimizer)
        return dataclasses.replace(recipe, output_dir=str(tmp_path))

    workers(1).run(f"{CASES}:groups_after_steps", recipe=recipe_with({}), num_steps=1)
    changed = recipe_with({"lr": 3e-3, "aligner_lr": 7e-5, "weight_decay": 0.2})
    ((groups, _, _, folder),) = workers(1).run(f"{CASES}:groups_after_resume", recipe=changed)
    assert folder is not None
    assert sorted(group["lr"] for group in groups.values()) == pytest.approx([7e-5, 7e-5, 2e-4, 2e-4, 3e-3, 3e-3])
    assert sorted(group["weight_decay"] for group in groups.values()) == pytest.approx([0, 0, 0, 0.2, 0.2, 0.2])
