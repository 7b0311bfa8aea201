"""Captions of WebDataset shards: the text of a `.txt` member beside its images, as one question with one answer."""

from megavlm.data.formats.columns import Columns
from megavlm.data.formats.finish import finish
from megavlm.data.formats.turns import PLACEHOLDERS, read_turns
from megavlm.data.row_options import RowOptions
from megavlm.data.sample import Sample
from megavlm.data.sources.tar_shards import CAPTION_KEY


def fits(columns: Columns) -> bool:
    """Whether the row is one of these."""
    return columns.has(CAPTION_KEY)


def read(columns: Columns, sample_id: str, options: RowOptions) -> Sample:
    """The row's sample.

    Raises:
        UseError: naming the row.
    """
    shown = "".join(placeholder * columns.count(kind) for kind, placeholder in PLACEHOLDERS.items())
    question = f"{shown}\n{options.caption_prompt}" if shown else options.caption_prompt
    entries = [{"role": "user", "content": question}, {"role": "assistant", "content": columns.take(CAPTION_KEY)}]
    turns = read_turns(entries, CAPTION_KEY, columns.where)
    return finish(columns, sample_id, turns, require_answer=True)
