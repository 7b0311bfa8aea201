"""Plain preference rows: {"prompt", "chosen", "rejected", "margin"?, "images"?}.

Each is a text, or (as TRL has them) a list of turns with role and content.
"""

from typing import Any

from megavlm.data.formats.columns import Columns
from megavlm.data.formats.finish import finish
from megavlm.data.formats.turns import read_turns
from megavlm.data.row_options import RowOptions
from megavlm.data.sample import Sample


def fits(columns: Columns) -> bool:
    """Whether the row is one of these."""
    return all(columns.has(key) for key in ("prompt", "chosen", "rejected"))


def read(columns: Columns, sample_id: str, options: RowOptions) -> Sample:
    """The row's sample.

    Raises:
        UseError: naming the row.
    """
    prompt, system = _turns("user", columns.take("prompt")), columns.take("system")
    chosen, rejected = (
        read_turns([*prompt, *_turns("assistant", columns.take(key))], f"prompt and {key}", columns.where, system)
        for key in ("chosen", "rejected")
    )
    return finish(columns, sample_id, chosen, require_answer=True, rejected=rejected)


def _turns(role: str, value: Any) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]
