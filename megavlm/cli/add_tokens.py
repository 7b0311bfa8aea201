"""`megavlm add-tokens`: a model with further tokens in its vocabulary."""

import argparse
from pathlib import Path

SUMMARY = "give a model further tokens, e.g. one for each coordinate of a box"

EPILOG = """\
Embeddings and output weights of the new tokens begin as the mean of the old ones: they have to be trained, so the
language model must neither be frozen nor be tuned by adapters alone. --coordinates adds <|0|> to <|999|>, and where
they are missing <|box_start|>, <|box_end|>, <|object_ref_start|>, <|object_ref_end|>: what
data.box_format=bin_tokens_1000 writes boxes with, and what sft.box_loss_coeff takes. --grid adds <patch_index_0000> to
<patch_index_1023>, <object>, </object>, <phrase>, </phrase>: what data.box_format=grid_tokens_32 writes.

examples:
  megavlm add-tokens --coordinates --hf-dir models/qwen3-vl --out models/qwen3-vl-boxes
  megavlm add-tokens '<think>' '</think>' --hf-dir models/llava --out models/llava-think
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.epilog = EPILOG
    parser.add_argument("tokens", metavar="TOKEN", nargs="*", help="a text that is to be one token")
    parser.add_argument("--coordinates", action="store_true", help="the tokens of data.box_format=bin_tokens_1000")
    parser.add_argument("--grid", action="store_true", help="the tokens of data.box_format=grid_tokens_32")
    parser.add_argument("--hf-dir", required=True, metavar="DIR", help="Hugging Face directory of the model")
    parser.add_argument("--out", required=True, metavar="DIR", help="new or empty directory")


def run(args: argparse.Namespace) -> int:
    """Add them."""
    import logging

    from megavlm.config.tasks import (
        BOX_MARKERS,
        GRID_MARKERS,
        GRID_SIDE,
        NUM_COORDINATE_BINS,
        cell_token,
        coordinate_token,
    )
    from megavlm.errors import use_error
    from megavlm.platform.start import start

    tokens = list(args.tokens)
    if args.coordinates:
        tokens += [*map(coordinate_token, range(NUM_COORDINATE_BINS)), *BOX_MARKERS]
    if args.grid:
        tokens += [*map(cell_token, range(GRID_SIDE**2)), *GRID_MARKERS]
    if not tokens:
        raise use_error("add-tokens", "nothing", "tokens", "name some, or add --coordinates or --grid")
    blank = [token for token in tokens if token != token.strip() or not token]
    if blank:
        raise use_error("add-tokens", repr(blank[0]), "texts without blanks around them", "remove the blanks")
    start()
    from megavlm.checkpoint.grow import write_with_tokens

    number, vocab_size = write_with_tokens(Path(args.hf_dir), Path(args.out), tokens)
    logging.getLogger("megavlm").info("%s: %d new tokens, a vocabulary of %d", args.out, number, vocab_size)
    return 0
