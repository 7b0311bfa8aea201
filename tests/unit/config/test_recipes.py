"""Every recipe of examples/recipes is one that can run, on the number of processes that it speaks of."""

import re
from pathlib import Path

import pytest

from megavlm.config.fit import validate_layout
from megavlm.config.load import load_recipe

RECIPES_DIR = Path(__file__).resolve().parents[3] / "examples" / "recipes"
RECIPES = sorted(RECIPES_DIR.glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 4


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_loads_and_its_layout_divides(path: Path) -> None:
    found = re.search(r"(?m)^# world size: (\d+)$", path.read_text(encoding="utf-8"))
    assert found, "a recipe says `# world size: N`"
    recipe = load_recipe(str(path), [])
    assert validate_layout(recipe, int(found.group(1))) >= 1
    assert recipe.model.hf_dir and recipe.data.train
