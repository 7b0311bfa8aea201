"""What Megatron-Core is told of FP8 where Transformer Engine computes it."""

from pathlib import Path
from typing import Any

from tests.pool import PoolKeeper
from tests.tiny import write_tiny_qwen3vl

KNOBS = (
    "fp8 fp8_recipe fp8_param fp8_margin fp8_amax_history_len fp8_amax_compute_algo first_last_layers_bf16 "
    "num_layers_at_start_in_bf16 num_layers_at_end_in_bf16"
).split()


def knobs(hf_dir: Path, sections: dict[str, Any]) -> list[dict[str, Any]]:
    """Run on a worker: these knobs in the configurations of the language model and of the tower."""
    from megavlm.checkpoint.hf_io import read_architecture
    from megavlm.config.load import recipe_from_dict
    from megavlm.config.numerics import compute_dtype
    from megavlm.models.build import transformer_config
    from megavlm.models.fp8 import fp8_settings
    from megavlm.models.tower_config import tower_config
    from megavlm.parallel.groups import initialize

    recipe, architecture = recipe_from_dict(sections), read_architecture(hf_dir)
    groups = initialize(recipe.parallel)
    language = transformer_config(
        architecture, recipe.model, recipe.parallel, compute_dtype(recipe), fp8_settings("language", recipe)
    )
    tower = tower_config(language, architecture.vision, groups.vision, fp8_settings("vision", recipe))
    return [{name: vars(config)[name] for name in KNOBS} for config in (language, tower)]


def test_language_model_and_tower_have_recipes_of_their_own(workers: PoolKeeper, tmp_path: Path) -> None:
    write_tiny_qwen3vl(tmp_path / "model")
    fp8 = {
        "fp8_recipe": "blockwise",
        "fp8_format": "e4m3",
        "vit_fp8_recipe": "tensorwise",
        "fp8_param_gather": True,
        "fp8_margin": 2,
        "fp8_amax_history_len": 16,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 2,
    }
    sections: dict[str, Any] = {"train": {"precision": "fp8"}, "model": {"backend": "te"}, "fp8": fp8}
    expected = {
        "fp8": "e4m3",
        "fp8_recipe": "blockwise",
        "fp8_param": True,
        "fp8_margin": 2,
        "fp8_amax_history_len": 16,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 2,
        "num_layers_at_end_in_bf16": 1,
    }

    def found(**changes: Any) -> list[dict[str, Any]]:
        changed = sections | {"fp8": fp8 | changes}
        return workers(1).run("tests.unit.models.test_fp8:knobs", hf_dir=tmp_path / "model", sections=changed)[0]

    assert found() == [expected, expected | {"fp8_recipe": "tensorwise"}]
    language, tower = found(vit_fp8_recipe="none")
    assert language == expected and tower["fp8"] is None and not tower["fp8_param"]
    for precision in ("bf16", "fp8_emulated"):  # emulation is not Megatron-Core's
        sections["train"] = {"precision": precision}
        assert [config["fp8"] for config in found()] == [None, None]
