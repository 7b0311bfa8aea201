"""`megavlm data index`: what planning needs to know of every row, found out once, beside the rows."""

import argparse
import shutil
from pathlib import Path

from rich.progress import Progress

from megavlm.cli.data_source import (
    add_nproc,
    add_output_arguments,
    add_source_arguments,
    nproc_of,
    open_source,
    show_table,
    write_json,
)

SUMMARY = "count the tokens and images of every row, and check every image, once before training"

EPILOG = """\
example:
  megavlm data index examples/recipes/demo_handwriting.yaml --nproc 8
  megavlm data index rows.jsonl --hf-dir models/qwen3-vl --max-length 8192

The index lies beside the rows, in .megavlm_index, or in data.index_dir; training and planning find it there, and
tokenise no row again: tokens are kept with it, about five bytes for each of the texts. It belongs to the files, the
model's processors and the knobs that decide about tokens: with others it is made anew. A build that was interrupted
goes on where it was. Rows that cannot be used are in its mistakes.txt; training stops at them, or leaves them out with
data.on_error=skip.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.epilog = EPILOG
    add_source_arguments(parser)
    add_nproc(parser)
    add_output_arguments(parser)
    parser.add_argument("--no-images", action="store_true", help="read headers of images only, decode none")
    parser.add_argument("--rebuild", action="store_true", help="make it anew, also where it is complete")


def run(args: argparse.Namespace) -> int:
    """Make the index, and say what is in it."""
    source = open_source(args)
    encoder = source.needed_encoder()
    from megavlm.data.index_files import index_beside
    from megavlm.data.index_workers import build_index_with_processes
    from megavlm.data.row_options import row_options
    from megavlm.data.rows import Rows
    from megavlm.train.datasets import index_name

    rows = Rows.open(source.paths, row_options(source.recipe.data))
    name = index_name(rows, encoder, not args.no_images)
    kept = source.recipe.data.index_dir
    folder = Path(kept) / name if kept else index_beside(Path(rows.paths[0]), name)
    if args.rebuild:
        shutil.rmtree(folder, ignore_errors=True)
    with Progress(transient=True) as bar:
        task = bar.add_task("rows, 1024 at a time")
        index = build_index_with_processes(
            folder,
            rows,
            encoder,
            check_images=not args.no_images,
            num_processes=nproc_of(args),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    facts = {
        "rows": index.num_rows,
        "kept": len(index.kept_N),
        "tokens": int(index.num_tokens_N.sum()),
        "images": len(index.grids.grids_GK),
        **{reason: len(rows.messages) for reason, rows in index.dropped.items()},
    }
    show_table(f"index in {folder}", ("", "number"), list(facts.items()))
    if index.num_mistakes:
        show_table("rows that cannot be used", ("first of them",), [(line,) for line in index.mistakes[:5]])
    write_json(args.json, {"folder": str(folder), **facts})
    return 0
