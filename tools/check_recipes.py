"""Dry-run recipes of real size: valid, divided, every rank's model built, memory within the GPU that they name.

Nothing but the model's config.json is needed: those of the published models lie in examples/models/, found by the last
part of the recipe's model.hf_dir. Run it through `make check-recipes`; `--json FILE` writes the figures.
"""

import argparse
import dataclasses
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megavlm.errors import RunError, UseError, use_error  # noqa: E402

RECIPES = ROOT / "examples" / "recipes"
MODELS = ROOT / "examples" / "models"
_WORLD_SIZE = re.compile(r"(?m)^# world size: (\d+)$")


def say(text: str) -> None:
    """One line."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def real_recipes() -> list[Path]:
    """Recipes of models whose config lies in examples/models."""
    from megavlm.config.load import load_recipe

    recipes = {path: load_recipe(path) for path in sorted(RECIPES.glob("*.yaml"))}
    return [path for path, recipe in recipes.items() if (MODELS / Path(recipe.model.hf_dir).name).is_dir()]


def check(path: Path) -> dict[str, Any]:
    """Dry-run one recipe; its figures.

    Raises:
        UseError: it is wrong, or does not fit.
        RunError: its ranks do not make up the model.
    """
    from megavlm.config.load import load_recipe
    from megavlm.train.dry_run import describe, dry_run

    started_s = time.perf_counter()
    recipe = load_recipe(path)
    world_size = _WORLD_SIZE.search(path.read_text(encoding="utf-8"))
    if world_size is None:
        raise use_error(str(path), "no world size", "a line `# world size: N`", "add it")
    found = dry_run(recipe, int(world_size[1]), MODELS / Path(recipe.model.hf_dir).name)
    if not found.fits:
        raise use_error(
            f"{path.name} gpu",
            f"{recipe.gpu} for {found.most_bytes / 1e9:.1f} GB",
            f"at most {found.hardware.usable_memory_bytes / 1e9:.0f} GB",
            "split it further, recompute more, or name a larger GPU",
        )
    say(f"{path.stem}: {describe(found)} ({time.perf_counter() - started_s:.1f} s)")
    return {
        "name": path.stem,
        "model": Path(recipe.model.hf_dir).name,
        "world_size": found.world_size,
        "num_parameters": found.num_parameters,
        "ranks": [dataclasses.asdict(rank) for rank in found.ranks],
        "row_tokens": found.row_tokens,
        "most_bytes": found.most_bytes,
        "usable_bytes": found.hardware.usable_memory_bytes,
    }


def record_evidence(figures: Sequence[dict[str, Any]]) -> None:
    """Write docs/evidence/recipes.json and recipes.md."""
    from tests.evidence import record, row

    record(
        "recipes",
        [
            row(
                f"{one['name']}: memory of {one['world_size']} ranks' fullest, rows of {one['row_tokens']} tokens",
                one["most_bytes"] / 1e9,
                unit="GB",
                required=f"<= {one['usable_bytes'] / 1e9:.0f}",
                reference=f"{one['num_parameters']} parameters on {len(one['ranks'])} kinds of ranks",
                command="make check-recipes",
            )
            for one in figures
        ],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Check them all; 1 when one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", type=Path, help="YAML files (default: all of real size)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args(arguments)
    from megavlm.platform.start import start

    start()
    figures, failed = [], 0
    for path in args.recipes or real_recipes():
        try:
            figures.append(check(path))
        except (UseError, RunError) as error:
            say(f"{path.stem}: FAILED: {error}")
            failed += 1
    if not args.recipes:
        record_evidence(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
