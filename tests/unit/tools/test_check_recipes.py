"""Recipes of real size without their machines: the tool as it is run, and what it says of wrong ones."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.check_recipes import MODELS, RECIPES, real_recipes

ROOT = Path(__file__).resolve().parents[3]
NAMES = [path.stem for path in real_recipes()]
# What is asked for at the least: sizes, long rows, FP8.
EXPECTED = {
    "qwen2_5_vl_7b_8gpus",
    "qwen3_vl_8b_8gpus",
    "qwen2_5_vl_32b",
    "qwen2_5_vl_72b",
    "qwen3_vl_30b_a3b",
    "qwen3_vl_235b_a22b",
    "qwen3_vl_8b_32k",
    "qwen3_vl_8b_262k",
    "qwen3_vl_8b_fp8",
    "qwen2_5_vl_7b_dpo",
    "qwen3_vl_32b_dpo",
}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/check_recipes.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=dict(os.environ))


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    file = tmp_path_factory.mktemp("recipes") / "figures.json"
    done = run("--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    return {one["name"]: one for one in json.loads(file.read_text())}


def test_the_sizes_that_are_asked_for_are_there() -> None:
    assert set(NAMES) >= EXPECTED


@pytest.mark.parametrize("name", NAMES)
def test_ranks_hold_the_model_that_transformers_makes(name: str, figures: dict[str, dict[str, Any]]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    found = figures[name]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(MODELS / found["model"]))
    assert found["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert sum(rank["num_alike"] for rank in found["ranks"]) == found["world_size"]
    held = sum(rank["num_parameters"] * rank["num_alike"] for rank in found["ranks"])
    assert held >= found["num_parameters"]  # copies, of the data ranks at the least
    assert 0 < found["most_bytes"] <= found["usable_bytes"]


# By file: what is changed in a good recipe, and what is said of it.
WRONG: dict[str, tuple[tuple[str, str], str]] = {
    "gpu": (("gpu: h100", "gpu: h100_with_8_gb"), "h100_with_8_gb"),
    "no_gpu": (("gpu: h100\n", ""), "the GPU that the recipe is meant for"),
    "ranks": (("# world size: 32", "# world size: 30"), "world size: got 30 processes"),
    "no_ranks": (("# world size: 32", "# for 32 ranks"), "no world size"),
    "stages": (("pipeline_model_parallel_size: 4", "pipeline_model_parallel_size: 8"), "8 stages"),
    "memory": (("max_length: 8192", "max_length: 262144"), "split it further"),
    "typing": (("precision: bf16", "precision: bf17"), "bf17"),
}


def test_wrong_recipes_are_named_with_their_mistake(tmp_path: Path) -> None:
    text = (RECIPES / "qwen3_vl_8b.yaml").read_text()
    for name, (change, _) in WRONG.items():
        assert change[0] in text
        (tmp_path / f"{name}.yaml").write_text(text.replace(*change))
    done = run(*(str(tmp_path / f"{name}.yaml") for name in WRONG))
    lines = done.stdout.strip().splitlines()
    assert done.returncode == 1 and len(lines) == len(WRONG), done.stdout + done.stderr
    for line, (name, (_, message)) in zip(lines, WRONG.items(), strict=True):
        assert line.startswith(f"{name}: FAILED: ") and message in line, line
