"""LLaVA: {"id", "image", "conversations": [{"from": "human", "value": "<image> Q"}, {"from": "gpt", "value": "A"}]}.

The same key has ms-swift's and LLaMA-Factory's sharegpt rows without preferences.
"""

from megavlm.data.formats.columns import Columns
from megavlm.data.formats.finish import finish
from megavlm.data.formats.turns import read_turns
from megavlm.data.row_options import RowOptions
from megavlm.data.sample import Sample

KEYS = ("conversations", "conversation")


def fits(columns: Columns) -> bool:
    """Whether the row is one of these."""
    return any(columns.has(key) for key in KEYS) and not (columns.has("chosen") or columns.has("rejected"))


def read(columns: Columns, sample_id: str, options: RowOptions) -> Sample:
    """The row's sample.

    Raises:
        UseError: naming the row.
    """
    turns = read_turns(columns.take_one(KEYS), "conversations", columns.where, columns.take("system"))
    return finish(columns, sample_id, turns, require_answer=options.require_answer)
