"""`megavlm data stats`: histograms of what is in the rows."""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from megavlm.cli.data_source import (
    ANY_LENGTH,
    add_nproc,
    add_output_arguments,
    add_source_arguments,
    nproc_of,
    open_source,
    say,
    show_table,
    write_json,
    write_page,
)

if TYPE_CHECKING:
    from megavlm.data.inspect.stats import Histogram, Stats

SUMMARY = "histograms of turns, tokens, image sizes and answers, and what padding would cost"

EPILOG = """\
Reads every row and the header of every image. With a model (--hf-dir, or a recipe) rows are encoded, too: tokens,
those that are learned, those of images; and the share of padding if each row were padded to max_length, and if rows
are packed (best fit decreasing, 1,024 rows at a time).

examples:
  megavlm data stats rows.jsonl --image-dir images --hf-dir models/qwen3-vl --html stats.html
  megavlm data stats examples/recipes/demo_handwriting.yaml data.max_length=128 --json stats.json
"""

_BAR_CHARACTERS = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.epilog = EPILOG
    add_source_arguments(parser)
    add_output_arguments(parser)
    add_nproc(parser)
    parser.add_argument("--packing-length", type=int, default=0, help="longest packed row (default: max_length)")
    parser.add_argument("--html", default="", metavar="FILE", help="also write a page there")


def run(args: argparse.Namespace) -> int:
    """Count, and print."""
    source = open_source(args)
    samples, encoder = source.rows(), source.encoder(ANY_LENGTH)
    from megavlm.data.inspect.stats import gather

    data = source.recipe.data
    stats = gather(
        samples,
        encoder,
        max_length=data.max_length,
        packing_length=args.packing_length or data.packing_length,
        nproc=nproc_of(args),
    )
    _show(stats)
    write_json(args.json, asdict(stats))
    if args.html:
        from megavlm.observe.data_pages import stats_page

        write_page(args.html, stats_page(", ".join(source.paths), stats))
    return 0


def _show(stats: "Stats") -> None:
    for one in stats.histograms:
        _show_histogram(one)
    show_table("In all", ["", "sum"], [["rows", stats.num_rows], *([*pair] for pair in stats.totals.items())])
    if stats.padding:
        rows = [[one.way, one.num_packs, f"{one.share:.1%}"] for one in stats.padding]
        show_table("Padding", ["rows", "packs", "share of padding"], rows)
    if stats.num_too_long:
        say(f"{stats.num_too_long:,} rows are longer than max_length: training leaves them out", style="bold")
    if stats.problems:
        say(f"{len(stats.problems):,} rows are left out (megavlm data check says why); the first:", style="bold")
        say(f"  {stats.problems[0]}")


def _show_histogram(one: "Histogram") -> None:
    most = max(count for _, count in one.bars)
    bars = [[label, "█" * round(_BAR_CHARACTERS * count / most), count] for label, count in one.bars]
    show_table(one.title, [one.unit or "name", "", "count"], bars)
    if one.figures:
        say("  " + "   ".join(f"{name} {value:,.4g}" for name, value in one.figures.items()) + "\n")
