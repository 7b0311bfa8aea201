"""Layers that the loss does not depend on have no information; others have, and cost what their adapters cost."""

from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.invariant import canon
from tests.pool import PoolKeeper
from tests.tiny import write_tiny_qwen3vl
from tests.unit.peft import information_cases

SILENT = 2


def test_a_layer_without_effect_has_no_information(workers: PoolKeeper, tmp_path: Path) -> None:
    hf_dir = write_tiny_qwen3vl(tmp_path / "model")
    weights = load_file(hf_dir / "model.safetensors")
    weights[f"model.language_model.layers.{SILENT}.self_attn.o_proj.weight"].zero_()
    save_file(weights, hf_dir / "model.safetensors", metadata={"format": "pt"})
    canon.write_rows(tmp_path)
    peft = {
        "components": "vision: frozen, projector: frozen, language: lora r=4",
        "target_modules": ("q_proj", "v_proj"),
    }
    recipe = canon.recipe(tmp_path, "model", peft=peft, parallel={"sequence_parallel": False})
    (layers,) = workers(1).run(information_cases.measure, recipe=recipe, num_rows=3)
    assert list(layers) == [("language", number) for number in range(4)]
    # one rank: 64 inputs each, and 128 and 32 outputs
    assert {one.num_parameters for one in layers.values()} == {64 + 128 + 64 + 32}
    for (_, number), one in layers.items():
        assert (one.information == 0) == (number == SILENT), number
    (again,) = workers(1).run(information_cases.measure, recipe=recipe, num_rows=3)
    assert again == layers
