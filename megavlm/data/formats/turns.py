"""Conversations of rows: turns as LLaVA, ms-swift, LLaMA-Factory and OpenAI write them, checked one by one."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from megavlm.data.messages import ANSWER_ROLES
from megavlm.data.readers import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from megavlm.data.sample import Turn
from megavlm.errors import UseError, use_error

Kind = Literal["image", "video"]

PLACEHOLDERS: dict[Kind, str] = {"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "tool_call": "tool_call",
    "function_call": "tool_call",
    "tool": "tool",
    "tool_response": "tool",
    "observation": "tool",
}
# What may come behind a turn; None is the beginning, behind an optional system turn.
_NEXT = {
    None: ("user",),
    "user": ("assistant", "tool_call"),
    "assistant": ("user", "tool_call"),
    "tool_call": ("tool_call", "tool"),
    "tool": ("tool", "tool_call", "assistant"),
}
_PART_KINDS = ("text", "image", "image_url", "video", "video_url")


@dataclass(frozen=True)
class PartMedia:
    """An image or a video that a content part brings along; `fps` where it says so of a list of frames."""

    value: Any
    fps: float | None = None


@dataclass
class Conversation:
    """Turns, and for each placeholder in their texts, in order, what a part brought along (None: the row's next)."""

    turns: list[Turn] = field(default_factory=list)
    named: dict[Kind, list[PartMedia | None]] = field(default_factory=lambda: {"image": [], "video": []})


def row_error(where: str, got: object, expected: str, fix: str = "repair or remove the row") -> UseError:
    """A complaint about a row."""
    return use_error(where, got, expected, fix)


def read_turns(entries: Any, name: str, where: str, system: Any = None) -> Conversation:
    """A list of turns; their order is not checked yet.

    Args:
        entries: as the row has them: objects with `role` and `content`, or `from` and `value`.
        name: of the column, for messages.
        where: file and row.
        system: the row's `system` column, a turn in front of them.

    Raises:
        UseError: anything that is no turn.
    """
    if not isinstance(entries, list):
        raise row_error(where, f"`{name}` of type {type(entries).__name__}", "a list of turns")
    conversation = Conversation()
    if isinstance(system, str) and system:
        conversation.turns.append(Turn(role="system", text=system))
    elif system not in (None, ""):
        raise row_error(where, f"`system` of type {type(system).__name__}", "a text")
    for index, entry in enumerate(_one_by_one(entries, where)):
        conversation.turns.append(_turn(entry, f"{name}[{index}]", where, conversation))
    return conversation


def as_json(value: Any, where: str) -> str:
    """A value of a row as JSON text.

    Raises:
        UseError: it holds what JSON has not, bytes of a table for instance.
    """
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise row_error(where, f"{str(value)[:80]} ({error})", "what JSON can say") from error


def _one_by_one(entries: list[Any], where: str) -> list[Any]:
    """Turns of entries that have two: ms-swift's `{"human", "assistant"}`, OpenAI's answers with `tool_calls`."""
    turns: list[Any] = []
    for entry in entries:
        if isinstance(entry, dict) and entry.get("tool_calls"):
            answer = {key: value for key, value in entry.items() if key != "tool_calls"}
            if answer.get("content"):
                turns.append(answer)
            calls = entry["tool_calls"] if isinstance(entry["tool_calls"], list) else [entry["tool_calls"]]
            functions = [call.get("function", call) if isinstance(call, dict) else call for call in calls]
            turns += [{**answer, "role": "tool_call", "content": as_json(one, where)} for one in functions]
            continue
        if isinstance(entry, dict) and set(entry) == {"human", "assistant"}:
            turns += [{"role": role, "content": entry[role]} for role in ("human", "assistant")]
        else:
            turns.append(entry)
    return turns


def check_order(turns: list[Turn], where: str, *, require_answer: bool) -> None:
    """User and assistant in turn, after an optional system turn; calls of tools, and what they say, before an answer.

    Raises:
        UseError: any other order, or no answer at the end where one is required.
    """
    roles = [turn.role for turn in turns]
    dialogue = roles[1:] if roles[:1] == ["system"] else roles
    if not all(role in _NEXT.get(before, ()) for before, role in zip([None, *dialogue], dialogue, strict=False)):
        raise row_error(where, f"turns by {', '.join(roles)}", "user and assistant in turn after an optional system")
    if not dialogue or (require_answer and dialogue[-1] not in ANSWER_ROLES):
        raise row_error(where, "no answer at the end", "a last turn by the assistant")


def _turn(entry: Any, name: str, where: str, conversation: Conversation) -> Turn:
    if not isinstance(entry, dict):
        raise row_error(where, f"{name} of type {type(entry).__name__}", "an object with role and content")
    raw_role = entry.get("role", entry.get("from"))
    role = ROLES.get(raw_role) if isinstance(raw_role, str) else None
    if role is None:
        raise row_error(where, f"{name} by {raw_role!r}", f"a role among {sorted(ROLES)}")
    content = entry.get("content", entry.get("value"))
    if role == "tool_call" and isinstance(content, dict):
        content = as_json(content, where)
    text = _text(content, name, where, conversation)
    loss, loss_scale = entry.get("loss"), entry.get("loss_scale")
    loss_scale = 1.0 if loss_scale is None else loss_scale
    if loss is not None and not isinstance(loss, bool):
        raise row_error(where, f"{name}.loss = {loss!r}", "true or false")
    if loss and role not in ANSWER_ROLES:
        raise row_error(where, f"{name}.loss = true on a {role} turn", "loss on assistant turns only")
    if isinstance(loss_scale, bool) or not isinstance(loss_scale, (int, float)) or not 0 <= loss_scale < 1e6:
        raise row_error(where, f"{name}.loss_scale = {loss_scale!r}", "a number of at least 0")
    if role in ANSWER_ROLES and (IMAGE_PLACEHOLDER in text or VIDEO_PLACEHOLDER in text):
        raise row_error(where, f"an image or a video in the answer {name}", "them in questions only")
    if role in ANSWER_ROLES and not text.strip():
        raise row_error(where, f"the empty answer {name}", "an answer with text")
    return Turn(role=role, text=text, loss=loss, loss_scale=float(loss_scale))


def _text(content: Any, name: str, where: str, conversation: Conversation) -> str:
    """The turn's text, with a placeholder for every part that is an image or a video."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise row_error(where, f"{name} with content of type {type(content).__name__}", "text or a list of parts")
    pieces: list[str] = []
    for part in content:
        kind, value = _part(part, name, where)
        if kind == "text":
            assert isinstance(value, str)
            pieces.append(value)
            for each, placeholder in PLACEHOLDERS.items():
                conversation.named[each].extend([None] * value.count(placeholder))
        else:
            assert not isinstance(value, str)
            pieces.append(PLACEHOLDERS[kind])
            conversation.named[kind].append(value)
    return "".join(pieces)


def _part(part: Any, name: str, where: str) -> tuple[Literal["text"] | Kind, str | PartMedia | None]:
    """(kind, the text; or what the part brings along, None where the row gives it elsewhere)."""
    if isinstance(part, dict):
        # In tables every part has all keys, those of the other kinds with nothing behind them.
        part = {key: value for key, value in part.items() if value is not None}
        kind = part.get("type", next((key for key in _PART_KINDS if key in part), None))
        value = part.get(kind) if isinstance(kind, str) else None
        if kind in ("image_url", "video_url") and isinstance(value, dict):
            value = value.get("url")
        if kind == "text" and isinstance(value, str):
            return "text", value
        if kind in ("image", "image_url"):
            return "image", PartMedia(value) if value else None
        if kind in ("video", "video_url"):
            return "video", PartMedia(value, _fps(part.get("sample_fps"), name, where)) if value else None
    raise row_error(where, f"{name} with the part {str(part)[:80]}", f"parts of type {', '.join(_PART_KINDS)}")


def _fps(value: Any, name: str, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise row_error(where, f"{name} with sample_fps {value!r}", "frames a second, more than 0")
    return float(value)
