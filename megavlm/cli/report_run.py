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

Of several runs, each of which goes on from the one before, --out gets one page: a chapter for each, with its results
before and after, curves, and some samples.

examples:
  megavlm report runs/pretrain_0_align runs/pretrain_1_all --title Pretraining --out runs/pretraining.html
  megavlm report runs/demo
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.epilog = EPILOG
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run, e.g. runs/demo")
    parser.add_argument("--out", help="of several runs: the page to write")
    parser.add_argument("--title", default="Training", help="of several runs: headline of the page")


def run(args: argparse.Namespace) -> int:
    """Write the page, and its path to standard output."""
    from megavlm.errors import use_error
    from megavlm.observe.report import write_report
    from megavlm.observe.report_runs import write_runs_report

    if args.out:
        path = write_runs_report(args.runs, args.out, args.title)
    elif len(args.runs) > 1:
        raise use_error("--out", "nothing, with several runs", "a file for the page about them", "add --out FILE.html")
    else:
        path = write_report(args.runs[0])
    sys.stdout.write(f"{path}\n")
    return 0
