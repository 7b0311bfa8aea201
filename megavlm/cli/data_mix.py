"""`megavlm data mix`: several files of rows as one."""

import argparse
from pathlib import Path

from megavlm.cli.data_source import add_output_arguments, say, show_table, write_json
from megavlm.errors import use_error

SUMMARY = "write one file out of several, in stated shares, by a stated seed"

EPILOG = """\
Each file's share is its weight^(1 / temperature); without --weights, its number of rows^(1 / temperature). Without
--num-rows the mixture is as large as it can be without a row that is in it twice; with more, each row of a file is in
it as often as any other, or once more. Rows are shuffled. The same words give the same file.

examples:
  megavlm data mix chat.jsonl ocr.jsonl grounding.jsonl --weights 2,1,1 --num-rows 100000 --seed 0 --out mixed.jsonl
  megavlm data mix chat.jsonl ocr.jsonl --temperature 2 --seed 0 --out mixed.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.epilog = EPILOG
    parser.add_argument("files", metavar="ROWS", nargs="+", help="files of rows")
    parser.add_argument("--image-dir", default="", help="root of relative image paths (default: the rows' folder)")
    parser.add_argument("--weights", default="", help="one number a file, with commas (default: their rows)")
    parser.add_argument("--temperature", type=float, default=1.0, help="above 1 gives more to small weights")
    parser.add_argument("--num-rows", type=int, default=0, help="of the mixture")
    parser.add_argument("--seed", type=int, default=0, help="of choice and order (default: 0)")
    parser.add_argument("--out", required=True, help="the new file (.jsonl)")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Draw, and write."""
    from megavlm.config.schema import DataConfig
    from megavlm.data.inspect.mixing import counts_of, draw, shares_of
    from megavlm.data.inspect.rows import open_rows
    from megavlm.data.inspect.write_rows import write_rows

    if args.num_rows < 0:
        raise use_error("--num-rows", args.num_rows, "at least 1", "leave it out for as many as there can be")
    sources = [open_rows([path], DataConfig(image_dir=args.image_dir)) for path in args.files]
    sizes = [len(source) for source in sources]
    shares = shares_of(sizes, _weights(args.weights), args.temperature)
    counts = counts_of(shares, sizes, args.num_rows)
    drawn = draw(counts, sizes, args.seed)
    num_rows = write_rows((sources[source][row] for source, row in drawn), Path(args.out))
    rows = [
        [path, size, f"{share:.1%}", count, f"{count / size:.2f}"]
        for path, size, share, count in zip(args.files, sizes, shares, counts, strict=True)
    ]
    show_table("Mixture", ["file", "rows", "share", "in the mixture", "passes"], rows)
    say(f"{num_rows:,} rows written to {args.out}, seed {args.seed}", style="bold")
    tree = [
        {"file": path, "rows": size, "share": share, "count": count}
        for path, size, share, count in zip(args.files, sizes, shares, counts, strict=True)
    ]
    write_json(args.json, {"rows": num_rows, "seed": args.seed, "sources": tree})
    return 0


def _weights(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")] if text else []
    except ValueError as error:
        raise use_error("--weights", repr(text), "numbers with commas between them", "write e.g. 2,1,1") from error
