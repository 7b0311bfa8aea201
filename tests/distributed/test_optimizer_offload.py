"""An optimizer in CPU memory trains to what one on the device does, step by step, also from its checkpoint on."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megavlm.config.schema import Recipe
from tests.contracts import TRANSFORMER_ENGINE
from tests.invariant import canon
from tests.invariant.layouts import layout
from tests.pool import PoolKeeper

NUM_STEPS, SAVE_AT = 6, 3
AWAY = {"optimizer_cpu_offload": True}
# name: (ranks, layout)
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, AWAY),
    "half of it, DP2, overlapped": (
        2,
        AWAY | {"optimizer_offload_fraction": 0.5, "overlap_cpu_optimizer_d2h_h2d": True},
    ),
    "PP2, encoder spread": (2, AWAY | layout(pp=2, placement="spread")),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("offload")
    canon.write_inputs(root)
    return root


def recipe_of(inputs: Path, out: Path, parallel: dict[str, Any]) -> Recipe:
    """The canonical run in bf16, written elsewhere."""
    recipe = canon.recipe(inputs, parallel=parallel, train={"precision": "bf16"})
    return dataclasses.replace(recipe, output_dir=str(out))


@pytest.mark.parametrize("name", CASES)
def test_trains_to_the_same(workers: PoolKeeper, inputs: Path, tmp_path: Path, name: str) -> None:
    size, parallel = CASES[name]
    on_device = {key: value for key, value in parallel.items() if "offload" not in key and "d2h" not in key}

    def run(where: str, parallel: dict[str, Any], num_steps: int, save: bool = False) -> list[dict[str, Any]]:
        recipe = recipe_of(inputs, tmp_path / where, parallel)
        # Megatron-Core asks for the version of Transformer Engine
        return workers(size, TRANSFORMER_ENGINE[0]).run(
            "tests.distributed.offload_cases:train", recipe=recipe, num_steps=num_steps, save=save
        )

    plain, away = run("plain", on_device, NUM_STEPS), run("away", parallel, NUM_STEPS)
    for own, other in zip(plain, away, strict=True):
        assert own["figures"] == other["figures"]
        assert (own["host"], own["device"], own["kept"]) == (0, 0, 0)
        assert other["kept"] == other["host"] + other["device"] > 0
        assert other["types"] == {"torch.float32"}
    share = sum(one["host"] for one in away) / sum(one["host"] + one["device"] for one in away)
    wanted = parallel.get("optimizer_offload_fraction", 1.0)
    assert wanted <= share <= min(1.0, wanted + 0.2)  # parameters go whole, until the fraction is reached
    # away, saved, and away again; then on the device from the same checkpoint
    first = run("saved", parallel, SAVE_AT, save=True)
    rest = run("saved", parallel, NUM_STEPS - SAVE_AT)
    device = run("saved", on_device, NUM_STEPS - SAVE_AT)
    for own, before, after, elsewhere in zip(plain, first, rest, device, strict=True):
        assert before["figures"] + after["figures"] == own["figures"]
        assert elsewhere["figures"] == own["figures"][SAVE_AT:]
