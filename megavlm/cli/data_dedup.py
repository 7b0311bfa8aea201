"""`megavlm data dedup`: a new file without the rows that are like an earlier one."""

import argparse
from dataclasses import asdict
from pathlib import Path

from megavlm.cli.data_source import (
    add_nproc,
    add_output_arguments,
    add_source_arguments,
    nproc_of,
    open_source,
    say,
    write_json,
)

SUMMARY = "write a new file without rows whose images and texts are those of an earlier row, exactly or nearly"

EPILOG = """\
The first of several rows that are alike is kept. Images are alike when their perceptual hashes differ in at most
--max-distance of 256 bits; texts when they have the same words, case and punctuation aside, or, with
--min-similarity, when the sets of three consecutive words in them overlap as much (Jaccard index; MinHash finds the
candidates). Rows that cannot be read stay out and are counted. --json lists every row that was dropped, and the one
kept in its stead.

examples:
  megavlm data dedup rows.jsonl more.jsonl --image-dir images --out unique.jsonl --json dropped.json
  megavlm data dedup rows.jsonl --by text --min-similarity 0.8 --out unique.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.epilog = EPILOG
    add_source_arguments(parser)
    add_output_arguments(parser)
    add_nproc(parser)
    parser.add_argument("--out", required=True, help="the new file (.jsonl)")
    parser.add_argument("--by", choices=["both", "image", "text"], default="both", help="what must be alike")
    parser.add_argument("--exact", action="store_true", help="images byte for byte, texts to the letter")
    parser.add_argument("--max-distance", type=int, default=16, help="bits in which images may differ (default: 16)")
    parser.add_argument("--min-similarity", type=float, default=1.0, help="of texts, up to 1 (default: the same words)")


def run(args: argparse.Namespace) -> int:
    """Find duplicates, and write the rest."""
    source = open_source(args)
    samples = source.rows()
    from megavlm.data.inspect.duplicates import find_duplicates
    from megavlm.data.inspect.write_rows import write_rows

    report = find_duplicates(
        samples,
        by=args.by,
        exact=args.exact,
        max_distance=args.max_distance,
        min_similarity=args.min_similarity,
        nproc=nproc_of(args),
    )
    num_written = write_rows((samples[row] for row in report.kept), Path(args.out))
    write_json(args.json, asdict(report))
    for one in report.dropped[:10]:
        say(f"  {one.sample_id} is like {one.kept}")
    if len(report.dropped) > 10:
        say(f"  and {len(report.dropped) - 10:,} more (--json for all)")
    say(
        f"{report.num_rows:,} rows: {len(report.dropped):,} dropped, {len(report.problems):,} not readable, "
        f"{num_written:,} written to {args.out}",
        style="bold",
    )
    if report.problems:
        say(f"  the first that is not readable: {report.problems[0]}")
    return 0
