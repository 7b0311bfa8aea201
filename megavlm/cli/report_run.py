"""`megavlm report`: write the report page of a run."""

import argparse
import sys

SUMMARY = "write one HTML page about a run: curves, samples, and the timeline of a recorded step"

EPILOG = """\
Reads metrics.jsonl of the run folder, and where they are there recipe.yaml, samples.json and timeline.json; writes
report.html beside them, which needs no network. A run writes the page itself at its end.

The timeline shows one training step, simulated above measured, one lane a pipeline rank, to zoom and to point at. With
it come the idle time of every rank by cause, the bubble share, the pad share, and how uneven the work of the encoder
and of the language model is over ranks and microbatches.

example:
  megavlm report runs/demo
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.epilog = EPILOG
    parser.add_argument("run", metavar="RUN", help="folder of the run, e.g. runs/demo")


def run(args: argparse.Namespace) -> int:
    """Write the page, and its path to standard output."""
    from megavlm.observe.report import write_report

    sys.stdout.write(f"{write_report(args.run)}\n")
    return 0
