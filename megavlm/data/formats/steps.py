"""TRL's rows for process rewards: {"prompt", "completions": [step, ...], "labels": [true, ...], "images"?}.

The prompt is a text, or a list of turns with role and content.
"""

from typing import Any

from megavlm.data.formats.columns import Columns
from megavlm.data.formats.finish import finish
from megavlm.data.formats.turns import read_turns, row_error
from megavlm.data.row_options import RowOptions
from megavlm.data.sample import Sample


def fits(columns: Columns) -> bool:
    """Whether the row is one of these."""
    return all(columns.has(key) for key in ("prompt", "completions", "labels"))


def read(columns: Columns, sample_id: str, options: RowOptions) -> Sample:
    """The row's sample; as a conversation, its steps stand in lines of the answer.

    Raises:
        UseError: naming the row.
    """
    prompt, steps, labels = (columns.take(key) for key in ("prompt", "completions", "labels"))
    asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) and step.strip() for step in steps):
        raise row_error(columns.where, f"`completions` {str(steps)[:60]}", "a list of steps, each a text")
    if not isinstance(labels, list) or len(labels) != len(steps) or not all(map(_is_label, labels)):
        expected = f"{len(steps)} times true or false, one for each step"
        raise row_error(columns.where, f"`labels` {str(labels)[:60]}", expected)
    answer = {"role": "assistant", "content": "\n".join(steps)}
    turns = read_turns([*asked, answer], "prompt and completions", columns.where, columns.take("system"))
    labelled = tuple(map(bool, labels))
    return finish(columns, sample_id, turns, require_answer=True, steps=tuple(steps), step_labels=labelled)


def _is_label(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))
