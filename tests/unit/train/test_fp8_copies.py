"""Layers that keep FP8 copies of their weights are told when the weights have changed."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from PIL import Image

from tests.contracts import TRANSFORMER_ENGINE
from tests.invariant import canon
from tests.pool import PoolKeeper
from tests.tiny import write_tiny_qwen3vl


def flags_after_a_step(recipe: Any) -> dict[str, list[bool]]:
    """`is_first_microbatch` of every layer of Transformer Engine, before the update and behind the step.

    The configuration says FP8 from the update on: the stand-in cannot compute in it.
    """
    from megavlm.train import step
    from megavlm.train.state import build_state

    state = build_state(recipe)
    real, found = step.clip_and_update, {}

    def flags() -> list[bool]:
        return [
            module.is_first_microbatch
            for model in state.models
            for module in model.modules()
            if "is_first_microbatch" in vars(module)
        ]

    def update(*args: Any) -> None:
        real(*args)
        found["update"] = flags()
        for model in state.models:
            vars(model.config)["fp8"] = "hybrid"

    with patch.object(step, "clip_and_update", update):
        step.train_step(state, 0)
    state.loader.close()
    return found | {"step": flags()}


@pytest.mark.next_core
def test_an_update_makes_fp8_copies_stale(workers: PoolKeeper, tmp_path: Path) -> None:
    write_tiny_qwen3vl(tmp_path / "tiny")
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    turns = [{"role": "user", "content": "<image>what is this?"}, {"role": "assistant", "content": "a red square"}]
    row = json.dumps({"messages": turns, "images": ["image.png"]})
    (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 8)
    recipe = canon.recipe(tmp_path, "tiny", model={"backend": "te"})
    (found,) = workers(1, TRANSFORMER_ENGINE[-1]).run(flags_after_a_step, recipe=recipe)
    # 4 layers each of language model and tower, 4 linears a layer, and those of the connectors
    assert len(found["update"]) == len(found["step"]) > 2 * 4 * 4
    assert not any(found["update"]) and all(found["step"])
