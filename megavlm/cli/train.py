"""`megavlm train`: run a recipe, in this process, in several that it starts, or as a part of torchrun's job."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megavlm.config.schema import Recipe

SUMMARY = "train a model by a recipe"

EPILOG = """\
examples:
  megavlm train RECIPE.yaml
  megavlm train examples/recipes/demo_handwriting.yaml train.train_iters=100 --nproc 4
  torchrun --nproc_per_node 8 -m megavlm train RECIPE.yaml train.global_batch_size=64

A run that was stopped goes on from its newest checkpoint when it is started again.
SIGTERM saves a checkpoint and ends with exit code 0.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.epilog = EPILOG
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override knobs, e.g. train.train_iters=100")
    parser.add_argument("--nproc", type=int, default=0, help="processes to start on this machine (not under torchrun)")
    parser.add_argument("--dry-run", action="store_true", help="check recipe, model and layout, then stop")


def run(args: argparse.Namespace) -> int:
    """Check the recipe before anything is built; then launch, or join torchrun's job."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or args.debug:
        return _run(args)
    try:
        return _run(args)
    except Exception as error:  # every rank may come here with the same mistake
        from megavlm.cli.report import report
        from megavlm.train.voice import speak_once

        return speak_once(error, report)


def _run(args: argparse.Namespace) -> int:
    from megavlm.config.load import load_recipe
    from megavlm.config.validate import validate_layout, validate_recipe
    from megavlm.errors import use_error
    from megavlm.platform.capabilities import needs_of, require

    under_torchrun = {"RANK", "WORLD_SIZE"} <= os.environ.keys()
    if under_torchrun and args.nproc:
        raise use_error("--nproc", args.nproc, "no --nproc under torchrun", "drop it; torchrun sets the processes")
    if args.nproc < 0:
        raise use_error("--nproc", args.nproc, "at least 1", "drop it for one process")
    recipe = load_recipe(args.recipe, args.overrides)
    validate_recipe(recipe)
    world_size = int(os.environ["WORLD_SIZE"]) if under_torchrun else max(1, args.nproc)
    validate_layout(recipe, world_size)
    for name in needs_of(recipe):
        require(name)
    if world_size > 1 and not under_torchrun and not args.dry_run:
        from megavlm.cli.launch import launch

        return launch(world_size, ["train", args.recipe, *args.overrides] + (["--debug"] if args.debug else []))
    # Not before a launch: reading a model's config imports torch and Megatron-Core, which takes the ranks' time again.
    check_model(recipe)
    if args.dry_run:
        return 0
    from megavlm.train.run import run_training

    return run_training(recipe)


def check_model(recipe: "Recipe") -> None:
    """Check a recipe against the sizes of its model.

    Raises:
        UseError: they do not fit.
    """
    from megavlm.platform.start import start

    start()
    from megavlm.checkpoint.hf_io import read_architecture
    from megavlm.config.validate import validate_model
    from megavlm.models.facts import facts_of

    validate_model(recipe, facts_of(read_architecture(Path(recipe.model.hf_dir), recipe.model)))
