"""What a recipe may say of sources, tasks and phases."""

from pathlib import Path

import pytest

from megavlm.config.load import load_recipe
from megavlm.config.mixture import phase_starts
from megavlm.config.mixture_knobs import CurriculumPhase, MixtureSource
from megavlm.config.schema import Recipe
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
SOURCES = "[{{name: docs, paths: [{rows}]{first}}}, {{name: charts, paths: [{rows}]{second}}}]"
EPOCHS = ["train.train_iters=0", "train.num_train_epochs=1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "recipe.yaml").write_text(BASE.format(folder=tmp_path))
    return tmp_path


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(folder / "recipe.yaml", overrides)


def sources(folder: Path, first: str = "", second: str = "") -> str:
    return "data.mixture=" + SOURCES.format(rows=folder / "rows.jsonl", first=first, second=second)


def test_sources_are_read(folder: Path) -> None:
    rows = (f"{folder}/rows.jsonl",)
    assert recipe_of(folder).data.mixture == (MixtureSource("docs", rows, 3.0), MixtureSource("charts", rows))
    changed = recipe_of(folder, sources(folder, ", epochs: 2", ", epochs: 0.5")).data.mixture
    assert [source.epochs for source in changed] == [2.0, 0.5]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [*EPOCHS, "data.mixture_stop=first_exhausted"],
        ["data.mixture_temperature=2"],
        ["data.curriculum=[{max_length: 99}, {start_iters: 3, weights: [0, 1]}, {start_fraction: 0.5, order: length}]"],
    ],
)
def test_good_mixtures(folder: Path, overrides: list[str]) -> None:
    validate_recipe(recipe_of(folder, *overrides))


def test_good_epochs_and_tasks(folder: Path) -> None:
    validate_recipe(recipe_of(folder, *EPOCHS, sources(folder, ", epochs: 2", ", epochs: 0.5")))
    tasks = "data.mixture_tasks=[{name: ocr}, {name: chat, weight: 2}]"
    validate_recipe(recipe_of(folder, tasks, sources(folder, ", task: ocr", ", task: chat")))


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["data.train=rows.jsonl"], ["data.train", "data.mixture too", "one of the two"]),
        (["data.mixture=[]"], ["data.train", "nothing"]),
        (["data.mixture=[{nam: a}]"], ["data.mixture[0].nam", "an unknown key", "data.mixture[0].name?"]),
        (["data.mixture=3"], ["data.mixture", "'3' (text)", "a list of mappings"]),
        (["data.mixture=[a]"], ["data.mixture[0]", "'a' (text)", "a section"]),
        (["data.mixture=[{name: a, weight: x}]"], ["data.mixture[0].weight", "a number"]),
        (["data.mixture=[{paths: [a]}]"], ["data.mixture[0].name", "nothing"]),
        (["data.mixture=[{name: a}]"], ["data.mixture[0].paths", "nothing"]),
        (["data.mixture=[{name: a, paths: [none.jsonl]}]"], ["data.mixture[0].paths[0]", "does not exist"]),
        (["data.mixture=[{name: a, paths: [b]}, {name: a, paths: [b]}]"], ["data.mixture[1].name", "`a` again"]),
        (["data.mixture=[{name: a, paths: [b], weight: -1}]"], ["data.mixture[0].weight", "-1.0"]),
        (["data.mixture=[{name: a, paths: [b], weight: 0}]"], ["data.mixture", "no weight above 0"]),
        (["data.mixture=[{name: a, paths: [b], task: c}]"], ["data.mixture[0].task", "without data.mixture_tasks"]),
        (["data.mixture_tasks=[{name: c}]"], ["data.mixture[0].task", "one of c"]),
        (["data.mixture_tasks=[{name: c, weight: 0}]"], ["data.mixture_tasks[0].weight", "more than 0"]),
        (["data.mixture_temperature=-1"], ["data.mixture_temperature", "at least 0"]),
        (["data.mixture_stop=all_exhausted"], ["data.mixture_stop", "with train.train_iters"]),
        (EPOCHS, ["train.num_train_epochs", "never ends"]),
        ([*EPOCHS, "data.mixture_stop=all_exhausted", "data.curriculum=[{}]"], ["data.curriculum", "train_iters"]),
        (["data.curriculum=[{start_iters: 1}]"], ["data.curriculum[0]", "a start at step 1"]),
        (["data.curriculum=[{}, {start_fraction: 0.01}]"], ["data.curriculum[1]", "a step after 0 and before 10"]),
        (["data.curriculum=[{}, {start_iters: 10}]"], ["data.curriculum[1]", "a start at step 10"]),
        (["data.curriculum=[{}, {start_iters: 2, start_fraction: 0.5}]"], ["start_fraction", "not both"]),
        (["data.curriculum=[{weights: [1]}]"], ["data.curriculum[0].weights", "1 weights", "each of 2 sources"]),
        (["data.curriculum=[{weights: [0, 0]}]"], ["data.curriculum[0].weights", "no weight above 0"]),
        (["data.curriculum=[{order: score}]"], ["data.curriculum[0].order", "one of default, length"]),
    ],
)
def test_mistakes_are_named(folder: Path, overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(UseError) as caught:
        validate_recipe(recipe_of(folder, *overrides))
    assert "\n" not in str(caught.value)
    for part in ["got ", "expected ", "fix: ", *parts]:
        assert part in str(caught.value)


def test_epochs_stand_alone(folder: Path) -> None:
    for first, second, overrides, part in (
        (", epochs: 2", "", [], "epochs for every source or for none"),
        (", epochs: 2, weight: 2", ", epochs: 1", [], "epochs with weights"),
        (", epochs: 2", ", epochs: 1", ["data.mixture_temperature=2"], "epochs with weights"),
        (", epochs: 2", ", epochs: 1", [*EPOCHS, "data.mixture_stop=all_exhausted"], "with epochs"),
        (", epochs: 2", ", epochs: 1", ["data.curriculum=[{weights: [1, 2]}]"], "weights with epochs"),
    ):
        with pytest.raises(UseError, match=part):
            validate_recipe(recipe_of(folder, sources(folder, first, second), *overrides))


def test_settings_of_a_mixture_need_one(folder: Path) -> None:
    alone = ["data.mixture=[]", f"data.train={folder}/rows.jsonl"]
    validate_recipe(recipe_of(folder, *alone, "data.curriculum=[{max_length: 99, order: length}, {start_iters: 3}]"))
    for override in ("data.mixture_temperature=2", "data.mixture_tasks=[{name: a}]", "data.mixture_stop=all_exhausted"):
        with pytest.raises(UseError, match="without data.mixture"):
            validate_recipe(recipe_of(folder, *alone, override))


def test_phases_begin_where_they_were_typed() -> None:
    fractions = (0.0, 0.1, 0.3, 0.7)
    data = Recipe().data.__class__(curriculum=tuple(CurriculumPhase(start_fraction=one) for one in fractions))
    assert phase_starts(data, 10) == (0, 1, 3, 7) and phase_starts(data, 15) == (0, 1, 4, 10)
