"""The same training with PIL's pixels and with DALI's."""

import json
from pathlib import Path
from typing import Any

import pytest

from megavlm.config.schema import DataConfig, ObserveConfig, OptimizerConfig, TrainConfig
from megavlm.platform.capabilities import probe
from tests.evidence import record, row
from tests.parity.cases import recipe_of
from tests.parity.conftest import WRITERS
from tests.parity.reference import amplify_vision
from tests.pictures import encoded, photo
from tests.pool import PoolKeeper

NUM_STEPS = 20
MOST = 1e-3
FAMILIES = ("qwen3_vl", "llava")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that ask about pieces of photographs."""
    root = tmp_path_factory.mktemp("photographs")
    lines = []
    for number in range(8):
        (root / f"{number}.jpg").write_bytes(encoded(photo(number, 150 + 20 * number, 260 - 15 * number), "JPEG"))
        answer = ("a red square", "the blue circle", "digits 0 1 2 3", "a lazy dog")[number % 4]
        turns = [{"role": "user", "content": "<image>what is it?"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns, "images": [f"{number}.jpg"]}))
    (root / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return root / "rows.jsonl"


@pytest.mark.skipif(not probe("nvidia-dali").available, reason="nvidia-dali is not installed")
@pytest.mark.parametrize("family", FAMILIES)
def test_dali_trains_to_pils_loss(family: str, photographs: Path, tmp_path: Path, workers: PoolKeeper) -> None:
    hf_dir = amplify_vision(WRITERS[family](tmp_path / "model"))
    losses: dict[str, list[float]] = {}
    for backend in ("pil", "dali"):
        sections: dict[str, Any] = {
            "data": DataConfig(train=(str(photographs),), max_pixels=128 * 128, image_backend=backend),
            "train": TrainConfig(train_iters=NUM_STEPS, precision="fp32", global_batch_size=4, seed=7),
            "optimizer": OptimizerConfig(lr=1e-3),
            "observe": ObserveConfig(tensorboard=False, progress=False, report=False),
        }
        recipe = recipe_of(hf_dir, {}, output_dir=str(tmp_path / backend), **sections)
        (steps,) = workers(1).run("tests.invariant.runs:train", recipe=recipe, num_steps=NUM_STEPS)
        assert all(step.num_images == 4 for step in steps)
        losses[backend] = [step.loss for step in steps]
    assert losses["pil"][-1] < 0.9 * losses["pil"][0], "nothing was learned"
    apart = max(abs(ours - by_pil) / by_pil for by_pil, ours in zip(losses["pil"], losses["dali"], strict=True))
    record(
        "data",
        [
            row(
                f"DALI, {family}: loss of {NUM_STEPS} steps, worst step",
                apart,
                unit="relative difference",
                required=f"<= {MOST:g}",
                reference="the same run with PIL",
                command="make test TESTS=tests/parity",
            )
        ],
    )
    assert 0 < apart <= MOST
