"""What each way of tuning holds in memory, counted in one training step, against training everything."""

import dataclasses
from typing import Any

import pytest

from megavlm.config.peft import PeftConfig
from megavlm.config.schema import DataConfig, OptimizerConfig, Recipe
from tests.distributed import memory_cases
from tests.evidence import record, row
from tests.invariant import canon
from tests.pool import PoolKeeper
from tests.tiny import write_tiny_qwen3vl

COMMAND = "make test TESTS=tests/distributed/test_peft_memory.py"
COMPONENTS = "vision: frozen, projector: frozen, language: "
# The encoder is frozen in all of them.
MODES: dict[str, dict[str, Any]] = {
    "full": {"components": f"{COMPONENTS}full"},
    "LoRA, rank 8": {"components": f"{COMPONENTS}lora r=8"},
    "DoRA, rank 8": {"components": f"{COMPONENTS}lora r=8", "use_dora": True},
    "QLoRA (NF4, double quantisation), rank 8": {
        "components": f"{COMPONENTS}lora r=8",
        "bnb_4bit_quant_type": "nf4",
    },
    "IA3": {"components": f"{COMPONENTS}ia3"},
    "adapters, width 16": {"components": f"{COMPONENTS}adapter size=16"},
    "parallel adapters, width 16": {"components": f"{COMPONENTS}parallel_adapter size=16"},
    "cross-modal adapters, width 16": {"components": f"{COMPONENTS}cross_modal_adapter size=16"},
    "prefix, 16 tokens": {"components": f"{COMPONENTS}prefix tokens=16"},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A model in bf16 whose language model's matrices are most of it."""
    root = tmp_path_factory.mktemp("memory")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "head_dim": 64}
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [12, 10, 10], "mrope_interleaved": True}
    changes = sizes | {"rope_parameters": rope}
    write_tiny_qwen3vl(root / "model", text_changes=changes, vision_changes={"out_hidden_size": 512})
    canon.write_rows(root)
    base = canon.recipe(root, "model", train={"precision": "bf16", "train_iters": 1, "global_batch_size": 2})
    data = DataConfig(train=(str(root / "rows.jsonl"),), shuffle=False)
    return dataclasses.replace(base, data=data, optimizer=OptimizerConfig())


def test_memory_of_each_mode(workers: PoolKeeper, recipe: Recipe) -> None:
    counted: dict[str, dict[str, int]] = {}
    for mode, peft in MODES.items():
        tuned = dataclasses.replace(recipe, peft=PeftConfig(**peft))
        (counted[mode],) = workers(1).run(memory_cases.count_tuning, recipe=tuned)
    whole = counted["full"]
    rows = []
    for mode, figures in counted.items():
        for part in ("all", "weights", "gradients", "optimizer", "activations"):
            rows.append(
                row(
                    f"memory, {mode}: {part}",
                    figures[part] / 1e6,
                    unit="MB, one step of a small model in bf16, encoder frozen",
                    reference="full",
                    reference_value=whole[part] / 1e6,
                    command=COMMAND,
                )
            )
    record("peft", rows)
    for mode, figures in counted.items():
        if mode != "full":
            states, full_states = (sum(one[part] for part in ("gradients", "optimizer")) for one in (figures, whole))
            assert 0 < states < 0.06 * full_states, mode
            assert figures["all"] < 0.6 * whole["all"], mode
    quantised, plain = counted["QLoRA (NF4, double quantisation), rank 8"], counted["LoRA, rank 8"]
    assert quantised["weights"] < 0.4 * plain["weights"]
    # quantised matrices are made when they are needed, and not kept for the backward pass
    assert quantised["activations"] <= 1.01 * plain["activations"]
