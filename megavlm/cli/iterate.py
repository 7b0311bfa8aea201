"""`megavlm iterate`: rounds of answering, scoring, and learning the best answers."""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megavlm.config.schema import Recipe
    from megavlm.train.rounds import Round

SUMMARY = "rounds of answering the rows' questions and learning the best answers (RAFT, ReST)"

EPILOG = """\
Each round: the model answers the questions of data.train (sample), the answers get rewards (score), the best are
learned as the recipe says (train), and the model is written as a Hugging Face directory (export), with which the next
round begins. Everything is in output_dir/name/round_N: answers.jsonl, scored.jsonl, kept.jsonl, summary.json, exported.
A loop that was stopped goes on where it was; with a larger iterate.num_rounds it goes on behind its end.

On several machines a job runs one phase after the other: sample and train on all ranks, score and export in one
process. Any engine may write answers.jsonl instead of sample: a line {"row": 0, "answers": ["...", null]} for each row.

examples:
  megavlm iterate RECIPE.yaml iterate.num_rounds=2 iterate.num_generations=8 --nproc 4
  torchrun --nproc_per_node 8 -m megavlm iterate RECIPE.yaml --round 1 --phase sample
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.epilog = EPILOG
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, of stage sft")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    parser.add_argument("--nproc", type=int, default=1, help="processes that answer and train (default: 1)")
    parser.add_argument("--round", type=int, default=0, help="with --phase: the round, from 1")
    parser.add_argument("--phase", choices=["sample", "score", "train", "export"], help="run this phase only, here")


def run(args: argparse.Namespace) -> int:
    """All rounds, or one phase of one."""
    from megavlm.config.iterate import check_iterate
    from megavlm.config.load import load_recipe
    from megavlm.config.validate import validate_layout, validate_recipe
    from megavlm.errors import use_error
    from megavlm.platform.capabilities import needs_of, require

    recipe = load_recipe(args.recipe, args.overrides)
    validate_recipe(recipe)
    check_iterate(recipe)
    for name in needs_of(recipe):
        require(name)
    if (args.phase is None) != (args.round == 0) or args.round < 0 or args.round > recipe.iterate.num_rounds:
        raise use_error(
            "--round", args.round, f"1 to {recipe.iterate.num_rounds} with --phase, and none without", "give both"
        )
    if args.phase:
        return _phase(recipe, args.round, args.phase)
    if "RANK" in os.environ:
        raise use_error("megavlm iterate", "all rounds under torchrun", "one phase", "add --round N --phase sample")
    if args.nproc < 1:
        raise use_error("--nproc", args.nproc, "at least 1", "drop it for one process")
    validate_layout(recipe, args.nproc)
    return _all(recipe, args)


def _all(recipe: "Recipe", args: argparse.Namespace) -> int:
    from megavlm.cli.launch import launch
    from megavlm.train.rounds import PHASES, Round, hold_recipe

    hold_recipe(recipe)
    words = ["iterate", args.recipe, *args.overrides] + (["--debug"] if args.debug else [])
    for number in range(1, recipe.iterate.num_rounds + 1):
        this = Round(recipe, number)
        for phase in PHASES:
            if this.is_done(phase):
                continue
            num_processes = args.nproc if phase in ("sample", "train") else 1
            code = launch(num_processes, [*words, "--round", str(number), "--phase", phase])
            if code:
                return code
            if not this.is_done(phase):  # training was asked to stop, and has saved
                sys.stdout.write(f"round {number}: stopped in {phase}; the same command goes on\n")
                return 0
        sys.stdout.write(this.summary.read_text(encoding="utf-8").replace("\n", "") + "\n")
    sys.stdout.write(f"{Round(recipe, recipe.iterate.num_rounds).exported}\n")
    return 0


def _phase(recipe: "Recipe", number: int, phase: str) -> int:
    from megavlm.cli.train import check_model
    from megavlm.errors import use_error
    from megavlm.platform.start import start
    from megavlm.train.rounds import PHASES, Round

    this = Round(recipe, number)
    before = this if phase != PHASES[0] else Round(recipe, number - 1)
    needed = PHASES[PHASES.index(phase) - 1]
    if before.number and not before.is_done(needed):
        raise use_error("--phase", f"{phase} of round {number}", f"{needed} of round {before.number} first", "run that")
    if this.is_done(phase):
        return 0
    if phase in ("score", "export") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise use_error("--phase", f"{phase} in several processes", "one process", "run it without torchrun")
    start()
    if phase == "train":
        return _train(this)
    if phase == "sample":
        check_model(this.answering)
    if phase == "export":
        return _export(this)
    from megavlm.parallel.groups import join_world
    from megavlm.train.answering import sample_round, score_round
    from megavlm.train.run import leaving_world

    join_world(recipe.train.distributed_timeout_s)
    with leaving_world():
        (sample_round if phase == "sample" else score_round)(this)
    return 0


def _train(this: "Round") -> int:
    from megavlm.config.validate import validate_recipe
    from megavlm.train.run import run_training

    validate_recipe(this.training)
    return run_training(this.training)


def _export(this: "Round") -> int:
    from megavlm.checkpoint.convert import export_checkpoint
    from megavlm.checkpoint.hf_io import HFDirectory
    from megavlm.checkpoint.native import find_checkpoint

    folder = find_checkpoint(this.checkpoints, required=True)
    assert folder is not None
    step = export_checkpoint(folder, HFDirectory(this.model_dir), Path(this.exported), None)
    logging.getLogger(__name__).info("round %d: step %d is in %s", this.number, step, this.exported)
    return 0
