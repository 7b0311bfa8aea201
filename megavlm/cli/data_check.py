"""`megavlm data check`: every row and every image, before training meets them."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megavlm.cli.data_source import (
    add_nproc,
    add_output_arguments,
    add_source_arguments,
    nproc_of,
    open_source,
    say,
    show_table,
    write_json,
)

if TYPE_CHECKING:
    from megavlm.data.inspect.check import CheckReport

SUMMARY = "look at every row and decode every image: what is missing, broken, repeated or out of range"

EPILOG = """\
Reads every row, decodes every image whole, and looks for: broken JSON, turns out of order, empty answers, repeated
rows; images that are missing, cannot be decoded or are truncated; boxes outside their image (of `objects`, and
written into the texts as shares, thousandths or pixels). With --hf-dir also rows that its chat template, tokenizer or
image processor refuse. These are mistakes: such a row does not pass.

Other things are only remarked on: images that are byte for byte another one or look like it (a perceptual hash of 256
bits that differs in at most --max-distance), rows that are too long or in which nothing is learned.

--write-clean writes the rows that pass, in their order, as `messages` rows; paths of images are seen from the new file.

examples:
  megavlm data check rows.jsonl --image-dir images --hf-dir models/qwen3-vl --write-clean clean.jsonl
  megavlm data check examples/recipes/demo_handwriting.yaml --json found.json

exit codes: 0 every row passes, 1 some do not
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.epilog = EPILOG
    add_source_arguments(parser)
    add_output_arguments(parser)
    add_nproc(parser)
    parser.add_argument("--write-clean", default="", metavar="FILE", help="write the rows that pass there (.jsonl)")
    parser.add_argument(
        "--max-distance", type=int, default=16, help="bits of 256 in which images that look alike may differ (16)"
    )
    parser.add_argument("--show", type=int, default=10, help="findings to print of each reason (default: 10)")


def run(args: argparse.Namespace) -> int:
    """Look, print, and write the rows that pass; 1 where one does not."""
    source = open_source(args)
    samples, encoder = source.rows(), source.encoder()
    from megavlm.data.inspect.check import check_rows
    from megavlm.data.inspect.write_rows import write_rows

    report = check_rows(samples, encoder, nproc_of(args), args.max_distance)
    _show(report, args.show)
    write_json(args.json, _tree(report))
    if args.write_clean:
        write_rows((samples[row] for row in report.passing), Path(args.write_clean))
        say(f"{len(report.passing):,} rows written to {args.write_clean}")
    return 0 if len(report.passing) == report.num_rows else 1


def _show(report: "CheckReport", num_shown: int) -> None:
    from megavlm.data.inspect.check import MISTAKES, REMARKS

    counts = report.counts()
    if counts:
        rows = [
            [reason, "mistake" if reason in MISTAKES else "remark", count, (MISTAKES | REMARKS)[reason]]
            for reason, count in counts.items()
        ]
        show_table("What was found", ["reason", "", "count", "what it is"], rows)
    for reason in counts if num_shown else ():
        messages = [finding.message for finding in report.findings if finding.reason == reason]
        say(f"{reason}:", style="bold")
        for message in messages[:num_shown]:
            say(f"  {message}")
        if len(messages) > num_shown:
            say(f"  and {len(messages) - num_shown:,} more (--show, or --json for all)")
    num_wrong = report.num_rows - len(report.passing)
    verdict = f"{num_wrong:,} do not pass" if num_wrong else "all pass"
    say(
        f"{report.num_rows:,} rows, {report.num_images:,} images: {verdict}",
        style="bold red" if num_wrong else "bold green",
    )


def _tree(report: "CheckReport") -> dict[str, object]:
    return {
        "rows": report.num_rows,
        "images": report.num_images,
        "passing": len(report.passing),
        "counts": report.counts(),
        "findings": [vars(finding) for finding in report.findings],
    }
