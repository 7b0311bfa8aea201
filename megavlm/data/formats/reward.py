"""Plain rows for rewards: {"problem", "answer" or "solution", "images"?}.

`answer` and `solution` stay columns, which reward functions get. Where rows must end with an answer, it is the
assistant's turn, too.
"""

from megavlm.data.formats.columns import Columns
from megavlm.data.formats.finish import finish
from megavlm.data.formats.turns import read_turns
from megavlm.data.row_options import RowOptions
from megavlm.data.sample import Sample

_ANSWERS = ("answer", "solution")


def fits(columns: Columns) -> bool:
    """Whether the row is one of these."""
    return columns.has("problem") and any(columns.has(key) for key in _ANSWERS)


def read(columns: Columns, sample_id: str, options: RowOptions) -> Sample:
    """The row's sample.

    Raises:
        UseError: naming the row.
    """
    rest = columns.rest()
    entries = [{"role": "user", "content": columns.take("problem")}]
    if options.require_answer:
        answer = next(rest[key] for key in _ANSWERS if rest.get(key) is not None)
        entries.append({"role": "assistant", "content": answer})
    turns = read_turns(entries, "problem and answer", columns.where, columns.take("system"))
    return finish(columns, sample_id, turns, require_answer=options.require_answer)
