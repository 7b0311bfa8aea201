"""`megavlm data`: the commands that look at rows and images before training, and those that write files of rows."""

import argparse

SUMMARY = "look at rows and images before training: index, check, stats, preview, dedup, score, mix"

COMMANDS: dict[str, str] = {
    "index": "megavlm.cli.data_index",
    "check": "megavlm.cli.data_check",
    "stats": "megavlm.cli.data_stats",
    "preview": "megavlm.cli.data_preview",
    "dedup": "megavlm.cli.data_dedup",
    "score": "megavlm.cli.data_score",
    "mix": "megavlm.cli.data_mix",
}

EPILOG = """\
  index    tokens and images of every row, found out once, beside the rows
  check    every row and every image: what is missing, broken, repeated or out of range
  stats    histograms of turns, tokens, image sizes and answers
  preview  a page with rows as the model will see them
  dedup    a new file without duplicates
  score    how well images and texts fit, by a CLIP model; hard negatives
  mix      several files into one, by weights

All but mix take files of rows, or a recipe (and overrides) whose rows they then look at.

examples:
  megavlm data check rows.jsonl --image-dir images
  megavlm data stats examples/recipes/demo_handwriting.yaml
  megavlm data COMMAND --help
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the group takes: the name of one of its commands."""
    parser.epilog = EPILOG
    parser.add_argument("command", choices=list(COMMANDS))


def run(args: argparse.Namespace) -> int:
    """Never reached: the frame runs the command that is named."""
    raise AssertionError(args.command)
