"""`megavlm data preview`: a page with rows as the model will see them."""

import argparse

from megavlm.cli.data_source import ANY_LENGTH, add_source_arguments, open_source, say, write_page

SUMMARY = "write an HTML page with rows as the model will see them: tokens, weights, positions, pixels"

EPILOG = """\
Encodes rows as training does, and shows every token, coloured by the weight of its loss, with its id and position,
the model's own tokens included. Images are shown as the encoder gets them: resized, cropped or cut into tiles, from
the very patches, with normalising undone.

examples:
  megavlm data preview rows.jsonl --image-dir images --hf-dir models/qwen3-vl --out preview.html
  megavlm data preview examples/recipes/demo_handwriting.yaml --num-rows 20 --seed 1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.epilog = EPILOG
    add_source_arguments(parser)
    parser.add_argument("--num-rows", type=int, default=8, help="rows to show (default: 8)")
    parser.add_argument("--seed", type=int, default=None, help="show random rows, by this seed, instead of the first")
    parser.add_argument("--out", default="preview.html", help="the page (default: preview.html)")


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    import random

    source = open_source(args)
    samples, encoder = source.rows(), source.needed_encoder(ANY_LENGTH)
    from megavlm.data.inspect.preview import show_row
    from megavlm.observe.data_pages import preview_page

    num_rows = min(args.num_rows, len(samples))
    numbers = list(range(num_rows))
    if args.seed is not None:
        numbers = sorted(random.Random(args.seed).sample(range(len(samples)), num_rows))
    rows = [show_row(samples, number, encoder, source.recipe.data.max_length) for number in numbers]
    write_page(args.out, preview_page(", ".join(source.paths), rows))
    num_broken = sum(bool(row.problem) for row in rows)
    say(f"{len(rows)} rows written to {args.out}" + f", {num_broken} with a problem" * bool(num_broken))
    return 0
