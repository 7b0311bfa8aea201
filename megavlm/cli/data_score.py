"""`megavlm data score`: how well images and texts fit; and which of other rows' nearly do."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megavlm.cli.data_source import (
    add_output_arguments,
    add_source_arguments,
    open_source,
    say,
    show_table,
    write_json,
    write_page,
)
from megavlm.errors import use_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megavlm.evaluate.image_text_scores import RowScore

SUMMARY = "score how well each row's images fit its text by a CLIP or SigLIP model; filter; find hard negatives"

EPILOG = """\
A row's score is the mean cosine of its images' embeddings with that of its text (its answers, or --text). Rows without
an image have none, and pass a filter. --scores writes one JSON object a row; --out writes the rows themselves with the
column image_text_score, with --min-score only those that reach it. Rows that cannot be read or whose images are broken
are counted, named and never written.

--hard-negatives K finds for each row the K images that fit its text best, and the rows of the K texts that fit its
first image best, none of which any row shows together with its own: columns hard_negative_images and
hard_negative_rows (the latter count from 0) of --scores and --out.

examples:
  megavlm data score rows.jsonl --image-dir images --model models/clip --scores scores.jsonl
  megavlm data score rows.jsonl --model models/siglip --min-score 0.2 --out fitting.jsonl
  megavlm data score rows.jsonl --model models/clip --hard-negatives 4 --scores negatives.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.epilog = EPILOG
    add_source_arguments(parser)
    add_output_arguments(parser)
    parser.add_argument("--model", required=True, help="Hugging Face directory of a CLIP or SigLIP model")
    parser.add_argument("--text", choices=["answers", "questions", "all"], default="answers", help="of the row's texts")
    parser.add_argument("--batch-size", type=int, default=32, help="images or texts at a time (default: 32)")
    parser.add_argument("--scores", default="", metavar="FILE", help="write scores there, one JSON object a row")
    parser.add_argument("--out", default="", metavar="FILE", help="write rows with their scores there (.jsonl)")
    parser.add_argument("--min-score", type=float, default=None, help="of the rows that are written to --out")
    parser.add_argument("--hard-negatives", type=int, default=0, metavar="K", help="find so many for each row")


def run(args: argparse.Namespace) -> int:
    """Score, print, write."""
    if args.min_score is not None and not args.out:
        raise use_error("--min-score", "no --out", "a file for the rows that reach it", "add --out FILE")
    for option, value, least in (("--batch-size", args.batch_size, 1), ("--hard-negatives", args.hard_negatives, 0)):
        if value < least:
            raise use_error(option, value, f"at least {least}", "correct it")
    source = open_source(args)
    samples = source.rows()
    from megavlm.platform.start import start

    start()
    from megavlm.data.inspect.write_rows import write_rows
    from megavlm.evaluate.image_text_scores import ImageTextModel, score_rows

    model = ImageTextModel(args.model)
    scores = score_rows(samples, model, which=args.text, batch_size=args.batch_size, num_negatives=args.hard_negatives)
    if args.scores:
        lines = [json.dumps({"row": one.row, "sample_id": one.sample_id, **_columns(one)}) for one in scores]
        write_page(args.scores, "".join(line + "\n" for line in lines))
    passing = [one for one in scores if _passes(one, args.min_score)]
    _show(scores, model.max_tokens)
    write_json(args.json, _summary(scores, passing))
    if args.out:
        num_rows = write_rows((samples[one.row] for one in passing), Path(args.out), map(_columns, passing))
        say(f"{num_rows:,} rows written to {args.out}", style="bold")
    return 0


def _passes(one: "RowScore", min_score: float | None) -> bool:
    return not one.problem and (one.score is None or min_score is None or one.score >= min_score)


def _columns(one: "RowScore") -> dict[str, Any]:
    columns: dict[str, Any] = {"image_text_score": one.score}
    if one.problem:
        columns["problem"] = one.problem
    if one.near_images or one.near_texts:
        columns |= {"hard_negative_images": list(one.near_images), "hard_negative_rows": list(one.near_texts)}
    return columns


def _summary(scores: "Sequence[RowScore]", passing: "Sequence[RowScore]") -> dict[str, Any]:
    import statistics

    values = [one.score for one in scores if one.score is not None]
    return {
        "rows": len(scores),
        "scored": len(values),
        "problems": sum(bool(one.problem) for one in scores),
        "cut_texts": sum(one.is_cut for one in scores),
        "passing": len(passing),
        "mean": statistics.fmean(values) if values else None,
        "median": statistics.median(values) if values else None,
    }


def _show(scores: "Sequence[RowScore]", max_tokens: int) -> None:
    values = sorted(one.score for one in scores if one.score is not None)
    if values:
        points = [
            (share, values[min(len(values) - 1, int(share * len(values)))])
            for share in (0, 0.05, 0.25, 0.5, 0.75, 0.95)
        ]
        rows = [[f"{share:.0%}", f"{value:.4f}"] for share, value in points] + [["100%", f"{values[-1]:.4f}"]]
        show_table("Scores", ["of the rows lie below", "score"], rows)
    num_cut = sum(one.is_cut for one in scores)
    if num_cut:
        say(f"{num_cut:,} texts are longer than the model's {max_tokens} tokens and were cut", style="bold")
    problems = [one.problem for one in scores if one.problem]
    if problems:
        say(f"{len(problems):,} rows have a problem; the first:", style="bold")
        say(f"  {problems[0]}")
    say(f"{len(scores):,} rows, {len(values):,} scored", style="bold")
