"""Rows back to a file: as ms-swift's `messages`, whatever they were read from, so that several spellings become one.
Rows in steps stay TRL's.

Paths of images become relative to the new file where they lie below its folder, absolute elsewhere. Images out of
tar shards and tables are written into the row, as data URIs. A video of single pictures stays a list of them; their
rate is `data.frames_fps` when it is read again.
"""

import base64
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megavlm.data.media import open_media
from megavlm.data.sample import FrameFiles, Media, Sample, Turn, Video, ZipMember
from megavlm.errors import use_error

_SIGNATURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}


def write_rows(samples: Iterable[Sample], path: Path, columns: Iterable[dict[str, Any]] | None = None) -> int:
    """Write rows as JSONL, under another name until all are there; returns how many.

    Args:
        samples: the rows.
        path: the new file, `.jsonl`.
        columns: further columns of each row.

    Raises:
        UseError: another ending, or a folder that cannot be written.
    """
    if path.suffix != ".jsonl":
        raise use_error(str(path), f"the ending `{path.suffix}`", "`.jsonl`", "give it another name")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    num_rows = 0
    more = iter(columns) if columns is not None else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            for sample in samples:
                row = row_of(sample, path.parent) | (next(more) if more is not None else {})
                file.write(_line(row, sample.sample_id))
                num_rows += 1
        temporary.replace(path)
    except OSError as error:
        raise use_error(str(path), str(error), "a file that can be written", "choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)
    return num_rows


def row_of(sample: Sample, folder: Path) -> dict[str, Any]:
    """A row as JSON types.

    Args:
        sample: the row.
        folder: from which paths are to be seen.
    """
    row: dict[str, Any] = {"messages": [_turn(turn) for turn in sample.turns]}
    if sample.steps:
        row = {"prompt": row["messages"][:-1], "completions": [*sample.steps], "labels": [*sample.step_labels]}
    if sample.rejected_turns:
        row["rejected_messages"] = [_turn(turn) for turn in sample.rejected_turns]
    if sample.images:
        row["images"] = [_reference(one, folder, "image") for one in sample.images]
    if sample.videos:
        row["videos"] = [_video(one, folder) for one in sample.videos]
    if sample.rejected_images is not None:
        row["rejected_images"] = [_reference(one, folder, "image") for one in sample.rejected_images]
    if sample.boxes:
        row["objects"] = {
            "ref": [box.reference for box in sample.boxes if box.reference],
            "bbox": [list(box.corners) for box in sample.boxes if box.corners],
            "bbox_type": sample.boxes[0].unit,
            "image_id": [box.image for box in sample.boxes if box.corners],
        }
    for key, value, default in (
        ("margin", sample.margin, None),
        ("label", sample.label, None),
        ("tools", sample.tools, ""),
        ("channel", sample.channel, ""),
        ("weight", sample.weight, 1.0),
    ):
        if value != default:
            row[key] = value
    return row | {key: value for key, value in sample.extra.items() if key not in row}


def _turn(turn: Turn) -> dict[str, Any]:
    entry: dict[str, Any] = {"role": turn.role, "content": turn.text}
    if turn.loss is not None:
        entry["loss"] = turn.loss
    if turn.loss_scale != 1.0:
        entry["loss_scale"] = turn.loss_scale
    return entry


def _line(row: dict[str, Any], sample_id: str) -> str:
    try:
        return json.dumps(row, ensure_ascii=False) + "\n"
    except TypeError as error:  # a column of a table that JSON has no type for
        raise use_error(
            sample_id, str(error), "columns of texts, numbers and lists", "leave that column out"
        ) from error


def _video(video: Video, folder: Path) -> str | list[str]:
    if isinstance(video, FrameFiles):
        return [_reference(one, folder, "image") for one in video.files]
    return _reference(video, folder, "video")


def _reference(media: Media, folder: Path, kind: str) -> str:
    if isinstance(media, ZipMember):
        media = f"{media.path}/{media.name}"
    if isinstance(media, str | Path):
        name = str(media)
        if "://" in name:
            return name
        seen = os.path.relpath(name, folder)
        return os.path.abspath(name) if seen.startswith(os.pardir) else seen
    with open_media(media) as file:
        data = file.read()
    known = (name for signature, name in _SIGNATURES.items() if data.startswith(signature))
    return f"data:{kind}/{next(known, 'x-unknown')};base64,{base64.b64encode(data).decode()}"
