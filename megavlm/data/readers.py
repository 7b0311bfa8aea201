"""Rows of the user's JSON and JSONL files, checked one by one, as `Sample`s.

Two spellings are read and told apart by their keys: LLaVA's `conversations` (`from` / `value`) and ms-swift's
`messages` (`role` / `content`, where content is text or a list of OpenAI-style parts). `<image>` in a text stands for
the next image of the row, `<video>` for the next video; neither is ever added where it is missing. Row numbers count
from 1 (in JSONL they are line numbers).
"""

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from megavlm.data.sample import Sample, Turn
from megavlm.errors import UseError, use_error

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"
_PLACEHOLDERS = {"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_TURN_KEYS = ("messages", "conversations", "conversation")
_IMAGE_KEYS = ("images", "image")
_VIDEO_KEYS = ("videos", "video")
# Columns that change what a row means and that are not read: to skip them would train on something else.
_UNREAD_KEYS = ("audios", "audio", "objects", "tools", "chat_template_kwargs")

_WHITESPACE = " \t\r\n"


def read_samples(paths: Sequence[str], image_dir: str = "", *, require_answer: bool = True) -> list[Sample]:
    """Read all rows of all files, in order.

    Args:
        paths: `.json` (an array of rows) or `.jsonl` (one row a line) files.
        image_dir: root of relative image paths; empty: the folder of the row's file.
        require_answer: whether each row must end with an answer; False also takes rows that end with a question.

    Raises:
        UseError: naming the file, and the row where there is one.
    """
    return [sample for path in paths for sample in iterate_samples(path, image_dir, require_answer=require_answer)]


def iterate_samples(path: str, image_dir: str = "", *, require_answer: bool = True) -> Iterator[Sample]:
    """The rows of one file, one after the other; JSONL is never held in memory as a whole. See `read_samples`."""
    if not os.path.isfile(path):
        raise use_error(path, "no such file", "a .json or .jsonl file of rows", "correct data.train or data.eval")
    if path.endswith(".jsonl"):
        rows = _iterate_jsonl(path)
    elif path.endswith(".json"):
        rows = _iterate_json(path)
    else:
        raise use_error(path, "an unknown file type", "a name that ends in .json or .jsonl", "rename or convert it")
    image_root = os.path.abspath(image_dir or os.path.dirname(path))
    num_rows = 0
    for row_number, row in rows:
        num_rows += 1
        yield _RowReader(path, row_number, image_root, require_answer).read(row)
    if num_rows == 0:
        raise use_error(path, "no rows", "at least one row", "check that the file was written completely")


def _iterate_jsonl(path: str) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:
        for row_number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if row_number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise _broken_json(f"{path} row {row_number}", error) from error
            yield row_number, row


def _iterate_json(path: str) -> Iterator[tuple[int, Any]]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except ValueError as error:
        raise _broken_json(path, error) from error
    position = _skip_whitespace(text, 0)
    if not text.startswith("[", position):
        raise use_error(
            path,
            f"a file that starts with {text[position : position + 1]!r}",
            "a JSON array of rows",
            "name it .jsonl if it holds one row a line",
        )
    # Row by row instead of json.loads, so that an error can name its row.
    decoder, row_number, separator = json.JSONDecoder(), 0, "["
    while separator != "]":
        position = _skip_whitespace(text, position + 1)
        if separator == "[" and text.startswith("]", position):
            separator = "]"
            continue
        row_number += 1
        try:
            row, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _broken_json(f"{path} row {row_number}", error) from error
        yield row_number, row
        position = _skip_whitespace(text, position)
        separator = text[position : position + 1]
        if separator not in (",", "]"):
            raise use_error(
                f"{path} row {row_number}", f"{separator!r} behind the row", "`,` or `]`", "repair the JSON array"
            )
    if (rest := text[position + 1 :].strip()) != "":
        raise use_error(path, f"{rest[:20]!r} behind the array", "the end of the file", "repair the JSON array")


def _skip_whitespace(text: str, position: int) -> int:
    while position < len(text) and text[position] in _WHITESPACE:
        position += 1
    return position


def _broken_json(where: str, error: Exception) -> UseError:
    return use_error(where, f"broken JSON ({error})", "valid UTF-8 JSON", "repair or remove the row")


class _RowReader:
    """One row on its way to a Sample; every complaint names the file and the row."""

    def __init__(self, path: str, row_number: int, image_root: str, require_answer: bool) -> None:
        self.where = f"{path} row {row_number}"
        self.sample_id = f"{path}:{row_number}"
        self.image_root = image_root
        self.require_answer = require_answer

    def error(self, got: object, expected: str, fix: str = "repair or remove the row") -> UseError:
        return use_error(self.where, got, expected, fix)

    def read(self, row: Any) -> Sample:
        if not isinstance(row, dict):
            raise self.error(type(row).__name__, "a JSON object")
        for key in _UNREAD_KEYS:
            if row.get(key):
                raise self.error(f"`{key}`", "text and images only", f"remove `{key}`, or leave the row out")
        turns_key = self._only_key(row, _TURN_KEYS, required=True)
        keys = {
            "image": self._only_key(row, _IMAGE_KEYS, required=False),
            "video": self._only_key(row, _VIDEO_KEYS, required=False),
        }
        # Each entry: a path that a content part brought along, or None for the next of the row's images (videos).
        named: dict[str, list[str | None]] = {"image": [], "video": []}
        turns = self._turns(row, turns_key, named)
        self._check_order(turns)
        files = {kind: self._files(kind, row.get(key) if key else None, named[kind]) for kind, key in keys.items()}
        extra = {key: value for key, value in row.items() if key not in (turns_key, "system", *keys.values())}
        return Sample(sample_id=self.sample_id, turns=turns, images=files["image"], videos=files["video"], extra=extra)

    def _only_key(self, row: dict[str, Any], keys: tuple[str, ...], *, required: bool) -> str:
        present = [key for key in keys if row.get(key) is not None]
        if len(present) > 1 or (required and not present):
            one_of = " or ".join(f"`{key}`" for key in keys)
            raise self.error(f"the keys {sorted(row)}", f"exactly one of {one_of}")
        return present[0] if present else ""

    def _turns(self, row: dict[str, Any], key: str, named: dict[str, list[str | None]]) -> tuple[Turn, ...]:
        entries = row[key]
        if not isinstance(entries, list):
            raise self.error(f"`{key}` of type {type(entries).__name__}", "a list of turns")
        turns = [self._turn(entry, f"{key}[{index}]", named) for index, entry in enumerate(entries)]
        system = row.get("system")
        if isinstance(system, str) and system:
            turns.insert(0, Turn(role="system", text=system))
        return tuple(turns)

    def _turn(self, entry: Any, name: str, named: dict[str, list[str | None]]) -> Turn:
        if not isinstance(entry, dict):
            raise self.error(f"{name} of type {type(entry).__name__}", "an object with role and content")
        raw_role = entry.get("role", entry.get("from"))
        role = _ROLES.get(raw_role) if isinstance(raw_role, str) else None
        if role is None:
            raise self.error(f"{name} by {raw_role!r}", f"a role among {sorted(_ROLES)}")
        text = self._text(entry.get("content", entry.get("value")), name, named)
        loss, loss_scale = entry.get("loss"), entry.get("loss_scale", 1.0)
        if loss is not None and not isinstance(loss, bool):
            raise self.error(f"{name}.loss = {loss!r}", "true or false")
        if loss and role != "assistant":
            raise self.error(f"{name}.loss = true on a {role} turn", "loss on assistant turns only")
        if isinstance(loss_scale, bool) or not isinstance(loss_scale, (int, float)) or not 0 <= loss_scale < 1e6:
            raise self.error(f"{name}.loss_scale = {loss_scale!r}", "a number of at least 0")
        if role == "assistant" and (IMAGE_PLACEHOLDER in text or VIDEO_PLACEHOLDER in text):
            raise self.error(f"an image or a video in the answer {name}", "them in questions only")
        if role == "assistant" and not text.strip():
            raise self.error(f"the empty answer {name}", "an answer with text")
        return Turn(role=role, text=text, loss=loss, loss_scale=float(loss_scale))

    def _text(self, content: Any, name: str, named: dict[str, list[str | None]]) -> str:
        """The turn's text, with `<image>` for every image part; adds what the parts say of their images and videos."""
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise self.error(f"{name} with content of type {type(content).__name__}", "text or a list of parts")
        pieces = []
        for part in content:
            kind, value = self._part(part, name)
            if kind == "text":
                pieces.append(value)
                for each, placeholder in _PLACEHOLDERS.items():
                    named[each].extend([None] * value.count(placeholder))
            else:
                pieces.append(_PLACEHOLDERS[kind])
                named[kind].append(value or None)
        return "".join(pieces)

    def _part(self, part: Any, name: str) -> tuple[str, str]:
        """(`text`, `image` or `video`; the text, or the file's path, empty where the row gives it elsewhere)."""
        kinds = ("text", "image", "image_url", "video", "video_url")
        if isinstance(part, dict):
            kind = part.get("type", next((key for key in kinds if key in part), None))
            value = part.get(kind) if isinstance(kind, str) else None
            if kind in ("image_url", "video_url") and isinstance(value, dict):
                value = value.get("url")
            if kind == "text" and isinstance(value, str):
                return "text", value
            if kind in kinds[1:] and (isinstance(value, str) or value is None):
                return kind.removesuffix("_url"), value or ""
        raise self.error(f"{name} with the part {str(part)[:80]}", f"parts of type {', '.join(kinds)}")

    def _check_order(self, turns: tuple[Turn, ...]) -> None:
        roles = [turn.role for turn in turns]
        dialogue = roles[1:] if roles[:1] == ["system"] else roles
        expected = ["user", "assistant"] * (len(dialogue) // 2 + 1)
        if dialogue != expected[: len(dialogue)]:
            raise self.error(f"turns by {', '.join(roles)}", "user and assistant in turn after an optional system")
        if not dialogue or (self.require_answer and dialogue[-1] != "assistant"):
            raise self.error("no answer at the end", "a last turn by the assistant")

    def _files(self, kind: str, listed: Any, named: list[str | None]) -> tuple[str, ...]:
        listed = [] if listed is None else [listed] if isinstance(listed, str) else listed
        if not isinstance(listed, list) or not all(isinstance(path, str) and path for path in listed):
            raise self.error(f"{kind}s {str(listed)[:80]}", "a path or a list of paths")
        num_open, placeholder = named.count(None), _PLACEHOLDERS[kind]
        if len(listed) != num_open:
            raise self.error(
                f"{len(listed)} {kind}s and {num_open} {placeholder} placeholders",
                f"as many {kind}s as placeholders",
                f"write {placeholder} into the text where each {kind} belongs",
            )
        rest = iter(listed)
        return tuple(self._resolve(kind, path or next(rest)) for path in named)

    def _resolve(self, kind: str, path: str) -> str:
        if path.startswith("data:") or "://" in path:
            raise self.error(f"the {kind} {path[:40]}", "a path of a local file", f"save the {kind} as a file")
        resolved = os.path.normpath(os.path.join(self.image_root, path))
        if not os.path.isfile(resolved):
            raise self.error(f"no {kind} file {resolved}", "an existing file", "correct the path or data.image_dir")
        return resolved
