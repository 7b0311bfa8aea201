"""What a recipe may say of tasks and boxes."""

from pathlib import Path

import pytest

from megavlm.config.load import load_recipe
from megavlm.config.schema import Recipe
from megavlm.config.stage_knobs import TaskWeight
from megavlm.config.tasks import task_names
from megavlm.config.validate import validate_recipe
from megavlm.errors import UseError

BASE = """
output_dir: {folder}/runs
model: {{hf_dir: "{folder}"}}
data:
  mixture:
    - {{name: docs, paths: ["{folder}/rows.jsonl"], weight: 3}}
    - {{name: charts, paths: "{folder}/rows.jsonl"}}
train: {{train_iters: 10, global_batch_size: 8, micro_batch_size: 2}}
"""
PLAIN = ["data.mixture=[]", "data.train={folder}/rows.jsonl"]
OF_TASKS = (
    "data.mixture=[{{name: docs, paths: [{folder}/rows.jsonl], task: read}},"
    " {{name: charts, paths: [{folder}/rows.jsonl], task: see}}]"
)
TASKS = "data.mixture_tasks=[{{name: read}}, {{name: see}}]"
FIXED = "sft.task_weighting=fixed"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "recipe.yaml").write_text(BASE.format(folder=tmp_path))
    return tmp_path


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(folder / "recipe.yaml", [one.format(folder=folder) for one in overrides])


def test_tasks_are_sources_or_what_sources_name(folder: Path) -> None:
    assert task_names(recipe_of(folder)) == ()
    assert task_names(recipe_of(folder, FIXED)) == ("docs", "charts")
    recipe = recipe_of(folder, FIXED, OF_TASKS, TASKS, "sft.task_weights=[{{name: see, weight: 0}}]")
    assert task_names(recipe) == ("read", "see")
    assert recipe.sft.task_weights == (TaskWeight("see", 0.0),)
    validate_recipe(recipe)


@pytest.mark.parametrize("way", ["fixed", "uncertainty", "gradnorm", "loss_ratio"])
def test_every_way_needs_no_more_than_its_name(folder: Path, way: str) -> None:
    validate_recipe(recipe_of(folder, f"sft.task_weighting={way}"))


def test_boxes(folder: Path) -> None:
    knobs = ["sft.box_loss_coeff=1", "data.box_format=bin_tokens_1000", "sft.box_l1_weight=1"]
    validate_recipe(recipe_of(folder, *knobs, "sft.task_weighting=uncertainty"))


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["sft.task_weighting=fixed", *PLAIN], ("sft.task_weighting", "no data.mixture", "sources")),
        (
            [FIXED, "data.mixture=[{{name: docs, paths: [{folder}/rows.jsonl]}}]"],
            ("sft.task_weighting", "fixed with one task"),
        ),
        (
            [FIXED, "sft.task_weights=[{{name: ocr, weight: 2}}]"],
            ("sft.task_weights[0].name", "`ocr`", "data.mixture: docs, charts"),
        ),
        (
            [FIXED, OF_TASKS, TASKS, "sft.task_weights=[{{name: docs, weight: 2}}]"],
            ("sft.task_weights[0].name", "data.mixture_tasks: read, see"),
        ),
        ([FIXED, "sft.task_weights=[{{name: docs}}, {{name: docs}}]"], ("sft.task_weights[1].name", "again")),
        ([FIXED, "sft.task_weights=[{{name: docs, weight: -1}}]"], ("sft.task_weights[0].weight", "at least 0")),
        ([FIXED, "sft.task_weights=[{{name: docs, weight: .nan}}]"], ("sft.task_weights[0].weight", "finite")),
        (
            [FIXED, "sft.task_weights=[{{name: docs, weight: 0}}, {{name: charts, weight: 0}}]"],
            ("sft.task_weights", "all 0"),
        ),
        (["sft.task_weights=[{{name: docs}}]"], ("sft.task_weights", "sft.task_weighting=fixed")),
        ([FIXED, "sft.task_weight_lr=0.1"], ("sft.task_weight_lr", "uncertainty or gradnorm")),
        (["sft.task_weighting=uncertainty", "sft.task_weight_alpha=1"], ("sft.task_weight_alpha", "gradnorm")),
        (["sft.task_weighting=gradnorm", "sft.task_weight_momentum=0"], ("sft.task_weight_momentum", "loss_ratio")),
        (["sft.task_weighting=loss_ratio", "sft.task_weight_temperature=0"], ("temperature", "more than 0")),
        (["sft.task_weighting=loss_ratio", "sft.task_weight_momentum=1"], ("sft.task_weight_momentum", "below 1")),
        (["sft.task_weighting=often"], ("sft.task_weighting", "gradnorm")),
        ([FIXED, "train.stage=dpo"], ("sft", "settings with train.stage dpo")),
        (["sft.box_loss_coeff=1"], ("sft.box_loss_coeff", "no box_format", "data.box_format=bin_tokens_1000")),
        (
            ["sft.box_loss_coeff=1", "data.box_format=json_1000"],
            ("sft.box_loss_coeff", "json_1000, where a coordinate is several tokens", "megavlm add-tokens"),
        ),
        (
            ["sft.box_loss_coeff=1", "data.box_format=grid_tokens_32"],
            ("sft.box_loss_coeff", "grid_tokens_32, where a token is a cell", "data.box_format=bin_tokens_1000"),
        ),
        (
            ["sft.box_loss_coeff=1", "data.box_format=numbers"],
            ("sft.box_loss_coeff", "numbers, where a coordinate is several tokens", "data.box_format=bin_tokens_1000"),
        ),
        (["sft.mask_loss_coeff=-1"], ("sft.mask_loss_coeff", "at least 0")),
        (["sft.mask_head_dim=64"], ("sft.mask_head_dim", "without sft.mask_loss_coeff")),
        (["sft.mask_loss_coeff=1", "sft.mask_head_dim=0"], ("sft.mask_head_dim", "at least 1")),
        (
            ["sft.mask_loss_coeff=1", "sft.mask_bce_weight=0", "sft.mask_dice_weight=0"],
            ("sft.mask_bce_weight", "one of them above 0"),
        ),
        (
            ["sft.mask_loss_coeff=1", "sft.task_weighting=gradnorm"],
            ("sft.mask_loss_coeff", "gradnorm", "one of the two"),
        ),
        (["sft.mask_loss_coeff=1", "train.stage=dpo"], ("sft", "train.stage dpo")),
        (["sft.box_loss_coeff=-1"], ("sft.box_loss_coeff", "at least 0")),
        (["sft.box_giou_weight=1"], ("sft.box_giou_weight", "without sft.box_loss_coeff")),
        (
            [
                "sft.box_loss_coeff=1",
                "data.box_format=bin_tokens_1000",
                "sft.box_giou_weight=0",
                "sft.box_l1_weight=0",
            ],
            ("sft.box_l1_weight", "above 0"),
        ),
        (
            ["sft.box_loss_coeff=1", "data.box_format=bin_tokens_1000", "sft.task_weighting=gradnorm"],
            ("sft.box_loss_coeff", "gradnorm", "one of the two"),
        ),
    ],
)
def test_contradictions_are_one_line(folder: Path, overrides: list[str], parts: tuple[str, ...]) -> None:
    with pytest.raises(UseError) as caught:
        validate_recipe(recipe_of(folder, *overrides))
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
