"""ms-swift: {"messages": [{"role", "content", "loss"?, "loss_scale"?}], "images", "videos", "objects", "tools", ...}.

Content is text or a list of OpenAI's parts. What makes it a preference row (DPO, RM, CPO ...): `rejected_response`,
another final answer or the turns behind the last question; `rejected_messages`, another conversation; or
`rejected_images`, with either or alone. A GRPO row has no final answer; further columns are kept for rewards.
"""

from typing import Any

from megavlm.data.formats.columns import Columns
from megavlm.data.formats.finish import finish
from megavlm.data.formats.turns import Conversation, read_turns, row_error
from megavlm.data.row_options import RowOptions
from megavlm.data.sample import Sample


def fits(columns: Columns) -> bool:
    """Whether the row is one of these."""
    return columns.has("messages")


def read(columns: Columns, sample_id: str, options: RowOptions) -> Sample:
    """The row's sample.

    Raises:
        UseError: naming the row.
    """
    entries, system = columns.take("messages"), columns.take("system")
    return finish(
        columns,
        sample_id,
        read_turns(entries, "messages", columns.where, system),
        require_answer=options.require_answer,
        rejected=_rejected(columns, entries, system),
        rejected_images=columns.take("rejected_images"),
    )


def _rejected(columns: Columns, entries: list[Any], system: Any) -> Conversation | None:
    response, messages = columns.take("rejected_response"), columns.take("rejected_messages")
    if response is not None and messages is not None:
        raise row_error(columns.where, "`rejected_response` and `rejected_messages`", "one of them")
    if messages is not None:
        # A system column is the whole row's; a conversation that has a system turn of its own keeps that.
        own = bool(messages) and isinstance(messages, list) and _role(messages[0]) == "system"
        return read_turns(messages, "rejected_messages", columns.where, None if own else system)
    if response is None:
        return None
    last_question = max((at for at, entry in enumerate(entries) if _role(entry) in ("user", "human")), default=-1)
    answers = [{"role": "assistant", "content": response}] if isinstance(response, str) else response
    if not isinstance(answers, list) or not answers or not isinstance(answers[0], dict):
        raise row_error(columns.where, f"`rejected_response` {str(response)[:60]!r}", "a text, or a list of turns")
    return read_turns([*entries[: last_question + 1], *answers], "rejected_response", columns.where, system)


def _role(entry: Any) -> Any:
    return entry.get("role", entry.get("from")) if isinstance(entry, dict) else None
