"""The planner's memory of parameter-efficient tuning against the bytes of real training steps."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megavlm.config.peft import PeftConfig
from tests.invariant import canon
from tests.invariant.layouts import layout
from tests.pool import PoolKeeper

MOST_ERROR = 0.05
_ALONE = "vision: frozen, projector: frozen, language: "
_LORA: dict[str, Any] = {"components": f"{_ALONE}lora r=4"}
_EVERYWHERE: dict[str, Any] = {"tuner_type": "lora", "lora_rank": 4}
_QUANTISED: dict[str, Any] = {"bnb_4bit_quant_type": "nf4"}
_TP, _SELECTIVE = layout(tp=2, sp=True), ("core_attn", "mlp", "layernorm")

# name: (family, ranks, layout, peft, whether it runs every time)
CASES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any], bool]] = {
    "lora, everything else frozen": ("qwen3_vl", 1, {}, _LORA, True),
    "lora everywhere": ("qwen3_vl", 1, {}, _EVERYWHERE, True),
    "lora, TP2+SP": ("qwen3_vl", 2, _TP, _EVERYWHERE, True),
    "lora, TP2": ("qwen3_vl", 2, layout(tp=2), _EVERYWHERE, False),
    "lora, CP2": ("qwen3_vl", 2, layout(cp=2), _EVERYWHERE, False),
    "lora, PP2": ("qwen3_vl", 2, layout(pp=2), _LORA, False),
    "lora, encoder spread, PP2": ("qwen3_vl", 2, layout(placement="spread", pp=2), _EVERYWHERE, False),
    "lora, full recompute": (
        "qwen3_vl",
        1,
        layout(recompute="full", recompute_method="uniform", recompute_num_layers=1),
        _EVERYWHERE,
        False,
    ),
    "lora, selective recompute": (
        "qwen3_vl",
        1,
        layout(recompute="selective", recompute_modules=_SELECTIVE),
        _EVERYWHERE,
        False,
    ),
    "lora of some linears": ("qwen3_vl", 1, {}, _LORA | {"target_modules": ("q_proj", "down_proj")}, True),
    "lora of some layers": (
        "qwen3_vl",
        1,
        {},
        {"components": "vision: frozen, projector: full, language[2:]: lora r=4"},
        True,
    ),
    "last layers whole": ("qwen3_vl", 1, {}, {"components": "vision: frozen, language[3:]: full"}, False),
    "dora": ("qwen3_vl", 1, {}, _EVERYWHERE | {"use_dora": True}, False),
    "qlora": ("qwen3_vl", 1, {}, _EVERYWHERE | _QUANTISED, True),
    "qlora without double quantisation, TP2+SP": (
        "qwen3_vl",
        2,
        _TP,
        _EVERYWHERE | _QUANTISED | {"bnb_4bit_use_double_quant": False},
        False,
    ),
    "ia3": ("qwen3_vl", 1, {}, {"tuner_type": "ia3", "target_modules": ("k_proj", "v_proj", "down_proj")}, True),
    "ia3, all linears": ("qwen3_vl", 1, {}, {"tuner_type": "ia3"}, False),
    "adapter": ("qwen3_vl", 1, {}, {"tuner_type": "adapter", "adapter_size": 8}, True),
    "cross-modal adapter": (
        "qwen3_vl",
        1,
        {},
        {"components": "vision: frozen, projector: full, language: cross_modal_adapter size=8"},
        True,
    ),
    "parallel adapter, TP2+SP": ("qwen3_vl", 2, _TP, {"tuner_type": "parallel_adapter", "adapter_size": 8}, False),
    "prefix": ("qwen3_vl", 1, {}, {"tuner_type": "prefix", "num_virtual_tokens": 4}, False),
    "lora, experts": ("qwen3_vl_moe", 1, {}, _EVERYWHERE, True),
    "lora, experts, EP2": ("qwen3_vl_moe", 2, layout(ep=2), _EVERYWHERE, False),
    "lora, llava": ("llava", 1, {}, _EVERYWHERE, True),
    "lora, internvl": ("internvl", 1, {}, _EVERYWHERE, True),
    "lora, qwen2_5_vl": ("qwen2_5_vl", 1, {}, _EVERYWHERE, True),
    "lora, gated cross-attention": ("gated_cross_attention", 1, {}, _LORA, False),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("memory")
    canon.write_inputs(root)
    return root


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[-1] or canon.FULL_MATRIX])
def test_predicted_is_counted(workers: PoolKeeper, inputs: Path, name: str, precision: str) -> None:
    family, world_size, parallel, peft, _ = CASES[name]
    recipe = canon.recipe(inputs, family, parallel=parallel, train={"precision": precision, "micro_batch_size": 2})
    recipe = dataclasses.replace(recipe, peft=PeftConfig(**peft))
    results = workers(world_size).run("tests.distributed.memory_cases:compare", recipe=recipe)
    for rank, parts in enumerate(results):
        assert parts["gradients"][0] > 0 and parts["activations"][0] > 0
        for part in ("weights", "gradients"):
            counted, predicted = parts[part]
            assert counted == predicted, (rank, part)
        for part in ("optimizer", "activations", "all"):
            counted, predicted = parts[part]
            assert abs(predicted / counted - 1) <= MOST_ERROR, (rank, part, counted, predicted)
