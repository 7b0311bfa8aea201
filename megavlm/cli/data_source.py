"""What the data commands share: where their rows come from, and how their tables look."""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megavlm.config.schema import DataConfig, ModelConfig, Recipe
from megavlm.errors import use_error

if TYPE_CHECKING:
    from megavlm.data.encode import SampleEncoder
    from megavlm.data.sample import Sample

ANY_LENGTH = 10**9
"""As max_length: rows of every length are encoded."""


@dataclass(frozen=True)
class Source:
    """The rows that a command looks at, and the recipe that they belong to; without one, of defaults."""

    recipe: Recipe
    paths: tuple[str, ...]

    def rows(self) -> "Sequence[Sample]":
        """All rows, in order."""
        from megavlm.data.inspect.rows import open_rows

        return open_rows(self.paths, self.recipe.data)

    def encoder(self, max_length: int = 0) -> "SampleEncoder | None":
        """What turns rows into tokens; None where no model is named.

        Args:
            max_length: instead of the recipe's; 0: the recipe's.
        """
        if not self.recipe.model.hf_dir:
            return None
        from megavlm.platform.start import start

        start()
        from megavlm.checkpoint.hf_io import read_architecture
        from megavlm.train.datasets import encoder_of

        data = replace(self.recipe.data, max_length=max_length or self.recipe.data.max_length)
        return encoder_of(replace(self.recipe, data=data), read_architecture(Path(self.recipe.model.hf_dir)).inputs)

    def needed_encoder(self, max_length: int = 0) -> "SampleEncoder":
        """As `encoder`, for commands that cannot do without.

        Raises:
            UseError: no model is named.
        """
        encoder = self.encoder(max_length)
        if encoder is None:
            raise use_error("--hf-dir", "nothing", "a Hugging Face directory", "add --hf-dir DIR, or name a recipe")
        return encoder


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where rows come from."""
    parser.add_argument(
        "source", metavar="ROWS|RECIPE", nargs="+", help="files of rows; or a recipe, and key=value for its keys"
    )
    parser.add_argument("--image-dir", default="", help="root of relative image paths (default: the rows' folder)")
    parser.add_argument("--hf-dir", default="", help="Hugging Face directory whose tokenizer and processors to ask")
    parser.add_argument("--max-length", type=int, default=0, help="longest sample in tokens (default: 4096)")
    parser.add_argument("--eval", action="store_true", help="of a recipe: its data.eval instead of data.train")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what several commands can do with what they found."""
    parser.add_argument("--json", default="", metavar="FILE", help="also write what was found there, as JSON")


def add_nproc(parser: argparse.ArgumentParser) -> None:
    """Declare how many processes work."""
    parser.add_argument("--nproc", type=int, default=0, help="processes (default: one a core)")


def nproc_of(args: argparse.Namespace) -> int:
    """How many processes are to work."""
    return int(args.nproc) or len(os.sched_getaffinity(0))


def open_source(args: argparse.Namespace) -> Source:
    """The rows that the words name.

    Raises:
        UseError: a recipe without rows, or options that contradict it.
    """
    first, *rest = args.source
    if not first.endswith((".yaml", ".yml")):
        data = DataConfig(train=tuple(args.source), image_dir=args.image_dir)
        data = replace(data, max_length=args.max_length or data.max_length)
        return Source(Recipe(model=ModelConfig(hf_dir=args.hf_dir), data=data), data.train)
    from megavlm.config.load import load_recipe

    for option, value in (("--image-dir", "image_dir"), ("--hf-dir", "hf_dir"), ("--max-length", "max_length")):
        if vars(args)[value]:
            key = f"{'model' if value == 'hf_dir' else 'data'}.{value}"
            raise use_error(option, "it and a recipe", "one of the two", f"write {key}=... behind the recipe")
    recipe = load_recipe(first, rest)
    mixed = tuple(path for source in recipe.data.mixture for path in source.paths)
    paths = recipe.data.eval if args.eval else recipe.data.train or mixed
    if not paths:
        key = "data.eval" if args.eval else "data.train"
        raise use_error(f"{first} {key}", "nothing", "files of rows", f"set {key}")
    return Source(recipe, paths)


def write_json(path: str, tree: Any) -> None:
    """What a command found, for programs; nothing is written where no file is named."""
    if not path:
        return
    try:
        Path(path).write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise use_error("--json", str(error), "a file that can be written", "choose another place") from error


def write_page(path: str, text: str) -> None:
    """A page, at the place that was asked for."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise use_error(path, str(error), "a file that can be written", "choose another place") from error


def show_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; columns of numbers stand right."""
    table = Table(title=title, title_justify="left")
    for heading, *cells in zip(headings, *rows, strict=True):
        is_figures = all(isinstance(cell, int | float) for cell in cells)
        table.add_column(heading, justify="right" if is_figures else "left", overflow="fold")
    for row in rows:
        # Brackets are the rows' own, not markup.
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else escape(str(cell)) for cell in row))
    _console().print(table)


def say(text: str, style: str | None = None) -> None:
    """Print a line: never wrapped, and brackets in it are its own, not markup."""
    _console().print(text, style=style, markup=False, soft_wrap=True)


def _console() -> Console:
    return Console(highlight=False)
