"""LLaMA-Factory's preference rows: {"conversations": [...], "chosen": {from, value}, "rejected": {from, value}}.

The conversation ends with a question; `chosen` and `rejected` answer it.
"""

from megavlm.data.formats.columns import Columns
from megavlm.data.formats.finish import finish, with_answer
from megavlm.data.formats.llava import KEYS
from megavlm.data.formats.turns import read_turns, row_error
from megavlm.data.messages import ANSWER_ROLES
from megavlm.data.row_options import RowOptions
from megavlm.data.sample import Sample, Turn


def fits(columns: Columns) -> bool:
    """Whether the row is one of these."""
    return any(columns.has(key) for key in KEYS) and (columns.has("chosen") or columns.has("rejected"))


def read(columns: Columns, sample_id: str, options: RowOptions) -> Sample:
    """The row's sample.

    Raises:
        UseError: naming the row.
    """
    asked = read_turns(columns.take_one(KEYS), "conversations", columns.where, columns.take("system"))
    if asked.turns and asked.turns[-1].role in ANSWER_ROLES:
        raise row_error(columns.where, "an answer in front of `chosen`", "conversations that end with a question")
    chosen, rejected = (with_answer(asked, _answer(columns, key)) for key in ("chosen", "rejected"))
    return finish(columns, sample_id, chosen, require_answer=True, rejected=rejected)


def _answer(columns: Columns, key: str) -> Turn:
    turns = read_turns([columns.take(key)], key, columns.where).turns
    if turns[0].role not in ANSWER_ROLES:
        raise row_error(columns.where, f"`{key}` by {turns[0].role}", "an answer (from: gpt)")
    return turns[0]
