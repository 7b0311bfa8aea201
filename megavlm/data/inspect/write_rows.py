"""Rows back to a file: as ms-swift's `messages`, whatever they were read from, so that several spellings become one.

Paths of images become relative to the new file where they lie below its folder, absolute elsewhere. An image out of an
archive or a table is written into the row, as a data URI.
"""

import base64
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megavlm.data.media import open_media
from megavlm.data.sample import Media, Sample, Turn
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
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
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
    if sample.rejected_turns:
        row["rejected_messages"] = [_turn(turn) for turn in sample.rejected_turns]
    for key, media in (("images", sample.images), ("videos", sample.videos)):
        if media:
            row[key] = [_reference(one, folder) for one in media]
    if sample.rejected_images is not None:
        row["rejected_images"] = [_reference(one, folder) for one in sample.rejected_images]
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


def _reference(media: Media, folder: Path) -> str:
    if isinstance(media, str | Path):
        name = str(media)
        if "://" in name or name.startswith("data:"):
            return name
        seen = os.path.relpath(name, folder)
        return os.path.abspath(name) if seen.startswith(os.pardir) else seen
    with open_media(media) as file:
        data = file.read()
    kind = next((kind for signature, kind in _SIGNATURES.items() if data.startswith(signature)), "")
    mime = f"image/{kind}" if kind else "application/octet-stream"
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
