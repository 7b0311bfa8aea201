"""`megavlm plan`: the quickest layouts of a recipe on a number of GPUs, under a stated cost model."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megavlm.config.schema import Recipe
    from megavlm.models.architecture import Architecture
    from megavlm.planner.workload import Sample

SUMMARY = "find the quickest layouts of a recipe for a number of GPUs, under a stated cost model"

EPILOG = """\
Reads the model's config.json and the lengths of rows and images (of the recipe's rows, or of --lengths), and goes
through all layouts that divide: tensor, context, pipeline, expert and data parallelism, model chunks, the encoder's
five places, layers of each stage, recompute, microbatches. Every model family is known; experts are taken to be chosen
alike. Prints the best five with step time, MFU, bubble and memory of a
rank by part, and why the others lost. The pipeline is simulated, the rest is arithmetic; nothing is measured on a GPU.

A hardware file is YAML with the keys of megavlm/planner/hardware.py, e.g. {base: h100, compute_efficiency: 0.5}.

example:
  megavlm plan examples/recipes/demo_handwriting.yaml --gpus 4 --hardware h100 --write layout.yaml
  megavlm plan examples/recipes/qwen3_vl_30b_a3b.yaml --gpus 32 --hardware h100 --lengths lengths.csv
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.epilog = EPILOG
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="recipe keys to change")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of the whole job")
    parser.add_argument("--hardware", default="h100", help="h100, b200 or a YAML file (default: h100)")
    parser.add_argument("--memory-gb", type=float, default=0.0, help="memory of a GPU in 10^9 bytes, if it is another")
    parser.add_argument("--lengths", default="", help="CSV of num_tokens and grids (or num_tiles); default: the rows")
    parser.add_argument("--write", default="", metavar="FILE", help="write the best layout's part of the recipe there")


def run(args: argparse.Namespace) -> int:
    """Search, and print."""
    from megavlm.config.load import load_recipe
    from megavlm.errors import use_error
    from megavlm.planner.hardware import find_hardware
    from megavlm.platform.start import start

    recipe = load_recipe(args.recipe, args.overrides)
    if not recipe.model.hf_dir:
        raise use_error("model.hf_dir", "nothing", "a Hugging Face directory", "set model.hf_dir")
    hardware = find_hardware(args.hardware, args.memory_gb)
    if args.write and Path(args.write).is_dir():
        raise use_error("--write", f"`{args.write}`, a directory", "a file", "name a file in it")
    start()
    from megavlm.checkpoint.hf_io import read_architecture
    from megavlm.planner.families import tower_traits
    from megavlm.planner.layouts import space_of
    from megavlm.planner.page import block, page
    from megavlm.planner.search import search
    from megavlm.planner.stepcosts import Problem
    from megavlm.planner.workload import typical_batch

    architecture = read_architecture(Path(recipe.model.hf_dir), recipe.model)
    tower_traits(architecture)  # a family that the planner does not know is said first
    samples = _samples(recipe, architecture, args.lengths)
    workload = typical_batch(architecture, samples, recipe.train.global_batch_size, recipe.data.max_length)
    space = space_of(recipe, args.gpus, hardware.gpus_per_node)
    found = search(Problem(workload, recipe, hardware, args.gpus), space)
    text = block(recipe, found.plans[0])
    sys.stdout.write(f"{page(found, hardware, args.gpus)}\n\n{text}")
    if args.write:
        Path(args.write).write_text(text, encoding="utf-8")
    return 0


def _samples(recipe: "Recipe", architecture: "Architecture", lengths: str) -> "list[Sample]":
    from megavlm.planner.workload import Sample, read_lengths

    if lengths:
        return read_lengths(lengths, architecture.inputs)
    from megavlm.config.validate import validate_recipe
    from megavlm.train.datasets import build_train_set, encoder_of

    validate_recipe(recipe)
    dataset, _ = build_train_set(recipe, encoder_of(recipe, architecture.inputs))
    return [
        Sample(int(length), grids) for length, grids in zip(dataset.num_tokens_each, dataset.grids_each, strict=True)
    ]
