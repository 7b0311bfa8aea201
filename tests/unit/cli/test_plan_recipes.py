"""Plans of recipes at real size, for every family that has more than a tower, an MLP and dense layers.

What is written must be a recipe that validates, on the number of GPUs that it was planned for.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.running import call
from tests.pool import PoolKeeper
from tests.unit.cli import real_configs

RECIPES_DIR = Path(__file__).resolve().parents[3] / "examples" / "recipes"
# Recipe, config, GPUs and hardware; composed models have the recipe of a model with the same tower.
CASES: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "experts": ("qwen3_vl_30b_a3b", real_configs.QWEN3_VL_30B_A3B, 8, "b200"),
    "LLaVA-NeXT": ("llava_next_7b", real_configs.LLAVA_NEXT_7B, 8, "h100"),
    "LLaVA-OneVision": ("llava_onevision_7b", real_configs.LLAVA_ONEVISION_7B, 8, "h100"),
    "perceiver": ("llava_1_5_7b", real_configs.PERCEIVER_7B, 8, "h100"),
    "Q-Former": ("llava_1_5_7b", real_configs.QFORMER_7B, 8, "h100"),
    "gated cross-attention": ("llava_1_5_7b", real_configs.GATED_7B, 8, "h100"),
}


def validate(recipe: str, overrides: list[str], num_gpus: int) -> dict[str, Any]:
    """Run on a worker: the recipe with the plan's knobs is checked as `megavlm train` does; returns `parallel`."""
    from megavlm.checkpoint.hf_io import read_architecture
    from megavlm.config.load import load_recipe
    from megavlm.config.validate import validate_layout, validate_model, validate_recipe
    from megavlm.models.facts import facts_of
    from megavlm.parallel.topology import topology_of

    planned = load_recipe(recipe, overrides)
    validate_recipe(planned)
    validate_layout(planned, num_gpus)
    validate_model(planned, facts_of(read_architecture(Path(planned.model.hf_dir))))
    assert topology_of(planned.parallel, num_gpus).world_size == num_gpus
    return vars(planned.parallel)


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_a_recipe_that_validates(name: str, workers: PoolKeeper, tmp_path: Path) -> None:
    stem, config, num_gpus, hardware = CASES[name]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "lengths.csv").write_text("num_tokens,num_tiles\n" + "1800,5\n400,1\n90,0\n3200,12\n" * 25)
    rows = [str(tmp_path / "rows.jsonl")]
    paths = [f"model.hf_dir={tmp_path / 'model'}", f"data.train={json.dumps(rows)}", f"data.eval={json.dumps(rows)}"]
    paths += [f"output_dir={tmp_path / 'runs'}"]
    recipe, out_file = str(RECIPES_DIR / f"{stem}.yaml"), tmp_path / "layout.yaml"
    words = ["plan", recipe, *paths, "--gpus", str(num_gpus), "--hardware", hardware]
    words += ["--lengths", str(tmp_path / "lengths.csv"), "--write", str(out_file)]
    ((code, out, err),) = workers(1).run(call, words=words, timeout_s=300)
    assert code == 0, err
    assert "1. " in out
    plan = yaml.safe_load(out_file.read_text())
    # the block stands for the whole section: what it leaves out has its default
    tree = yaml.safe_load(Path(recipe).read_text()) | {"parallel": plan.pop("parallel")}
    for section, values in plan.items():
        tree[section] |= values
    merged = tmp_path / "planned.yaml"
    merged.write_text(yaml.safe_dump(tree))
    (parallel,) = workers(1).run(validate, recipe=str(merged), overrides=paths, num_gpus=num_gpus)
    if name == "experts":
        assert parallel["expert_model_parallel_size"] > 1  # the experts of one GPU would not fit
        assert "experts EP" in out
    else:
        assert parallel["expert_model_parallel_size"] == 1
