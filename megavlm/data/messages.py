"""Turns of a row as the messages that chat templates take.

Calls of tools (`tool_call` turns: JSON with `name` and `arguments`) become part of an assistant's message, what the
tools say (`tool` or `tool_response`) messages of the role `tool`.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megavlm.data.readers import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from megavlm.data.sample import Turn
from megavlm.errors import use_error

ANSWER_ROLES = ("assistant", "tool_call")
_TOOL_ROLES = ("tool", "tool_response")
_SPLIT = re.compile(f"({IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER})")

Part = dict[str, str]
Message = dict[str, Any]


@dataclass(frozen=True)
class Spoken:
    """One message.

    Attributes:
        role: as templates know it: system, user, assistant or tool.
        parts: texts and placeholders, in order.
        calls: of tools: name and arguments.
        scale: `loss_scale`, 0 where `loss` is False.
    """

    role: str
    parts: tuple[Part, ...]
    calls: tuple[dict[str, Any], ...]
    scale: float

    @property
    def text(self) -> str:
        """Its texts, one behind the other."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")

    @property
    def printed(self) -> list[str]:
        """What a template must not leave out of an answer."""
        return [text for text in (self.text.strip(), *(call["name"] for call in self.calls)) if text]

    def message(self, show: Callable[[str], str] | None = None) -> Message:
        """The message for the template; `show` replaces its texts.

        Content is a list of parts, but plain text where parts are not usual: from tools, and beside calls of tools.
        """
        parts = [
            {**part, "text": show(part["text"])} if show is not None and part["type"] == "text" else part
            for part in self.parts
        ]
        only_text = all(part["type"] == "text" for part in parts)
        content: Any = parts
        if only_text and (self.role == "tool" or (self.calls and not self.text)):
            content = "".join(part["text"] for part in parts)
        message: Message = {"role": self.role, "content": content}
        if self.calls:
            message["tool_calls"] = [{"type": "function", "function": call} for call in self.calls]
        return message


def spoken(turns: Sequence[Turn], breaks_line: bool) -> list[Spoken]:
    """Turns as messages; calls that follow each other, or a text of the assistant, are one message with it.

    Args:
        turns: of a row.
        breaks_line: whether the template breaks the line behind an image: then the text's own break is left out.

    Raises:
        UseError: a call of a tool that is no JSON object with a name, or marks of loss that differ within a message.
    """
    messages: list[Spoken] = []
    for turn in turns:
        scale = 0.0 if turn.loss is False else turn.loss_scale
        if turn.role == "tool_call":
            calls = _calls(turn.text)
            before = messages[-1] if messages else None
            if before is None or before.role != "assistant":
                messages.append(Spoken("assistant", (text_part(""),), calls, scale))
                continue
            if before.scale != scale:
                raise use_error(
                    "a tool_call turn",
                    f"loss marks unlike those of the answer before it ({scale} and {before.scale})",
                    "the same: both are printed as one answer",
                    "correct `loss` or `loss_scale`",
                )
            messages[-1] = Spoken("assistant", before.parts, before.calls + calls, scale)
            continue
        role = "tool" if turn.role in _TOOL_ROLES else turn.role
        messages.append(Spoken(role, tuple(content_parts(turn.text, breaks_line)), (), scale))
    return messages


def text_part(text: str) -> Part:
    """A text as a content part."""
    return {"type": "text", "text": text}


def content_parts(text: str, breaks_line: bool) -> list[Part]:
    """A turn's text as content parts, `<image>` and `<video>` as parts of their own."""
    parts: list[Part] = []
    for piece in _SPLIT.split(text):
        if piece in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER):
            parts.append({"type": piece.strip("<>")})
            continue
        if breaks_line and parts and parts[-1]["type"] != "text":
            # LLaVA rows say `<image>\n`; where the template breaks the line too, one of them is enough.
            piece = piece.removeprefix("\n")
        if piece:
            parts.append(text_part(piece))
    return parts or [text_part("")]


def _calls(text: str) -> tuple[dict[str, Any], ...]:
    try:
        value = json.loads(text)
        calls = value if isinstance(value, list) else [value]
        return tuple(_call(call) for call in calls)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise use_error(
            "a tool_call turn",
            f"{text[:60]!r} ({error})",
            'JSON like {"name": "search", "arguments": {"query": "..."}}',
            "repair the row",
        ) from error


def _call(call: Any) -> dict[str, Any]:
    call = call.get("function", call)
    arguments = call["arguments"] if "arguments" in call else call.get("parameters", {})
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(call["name"], str) or not call["name"] or not isinstance(arguments, dict):
        raise ValueError("no name, or arguments that are no object")
    return {"name": call["name"], "arguments": arguments}


def parse_tools(tools: str) -> list[dict[str, Any]]:
    """`Sample.tools` as templates take them: a list of functions.

    Raises:
        UseError: no JSON, or a tool without a name.
    """
    if not tools:
        return []
    try:
        value = json.loads(tools)
        listed = value if isinstance(value, list) else [value]
        listed = [json.loads(tool) if isinstance(tool, str) else tool for tool in listed]
        # Bare functions, as some rows list them.
        listed = [tool if "function" in tool else {"type": "function", "function": tool} for tool in listed]
        if not all(isinstance(tool["function"]["name"], str) for tool in listed):
            raise ValueError("a name that is no text")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise use_error(
            "`tools`", f"{tools[:60]!r} ({error})", "a JSON list of functions with names", "repair the row"
        ) from error
    return listed
