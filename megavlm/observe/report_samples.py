"""The held-out samples of a report: answers marked, images scaled down and carried inside the page."""

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from megavlm.errors import use_error

MAX_IMAGE_PX = 320
_MAX_PNG_BYTES = 40_000


@dataclass(frozen=True)
class Picture:
    """An image of a sample: `uri` holds its data; where that is empty, `problem` says why there is none."""

    name: str
    uri: str = ""
    width_px: int = 0
    height_px: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Answer:
    """What the model said at one time ("before training", "after training"), and whether that is the truth."""

    when: str
    text: str
    is_right: bool


@dataclass(frozen=True)
class ShownSample:
    """One card of the gallery."""

    sample_id: str
    task: str
    pictures: tuple[Picture, ...]
    question: str
    truth: str
    before: Answer | None
    after: Answer | None


def read_samples(path: Path) -> list[ShownSample]:
    """The samples of a `samples.json`; none where there is no such file. An image that cannot be read is no error.

    Raises:
        UseError: the file is no list of samples; says which one is wrong.
    """
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise use_error(str(path), str(error), "JSON", "write it again, or remove it") from None
    if not isinstance(entries, list):
        raise use_error(str(path), type(entries).__name__, "a list of samples", "write it again, or remove it")
    return [
        _shown_sample(entry, f"{path} sample {number}", path.parent) for number, entry in enumerate(entries, start=1)
    ]


def share_right(answers: list[Answer | None]) -> float | None:
    """The share of right answers among those given; None where none was."""
    given = [answer.is_right for answer in answers if answer is not None]
    return sum(given) / len(given) if given else None


def embed_image(path: Path) -> Picture:
    """Read an image and put it into a data URI, upright, on white, its longer side at most 320 px."""
    try:
        with Image.open(path) as opened:
            image = _flatten(ImageOps.exif_transpose(opened))
    except FileNotFoundError:
        return Picture(path.name, problem="missing")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return Picture(path.name, problem=f"not readable: {error}")
    image.thumbnail((MAX_IMAGE_PX, MAX_IMAGE_PX), Image.Resampling.LANCZOS)
    kind, data = "png", _encode(image, "PNG")
    if len(data) > _MAX_PNG_BYTES:
        kind, data = "jpeg", _encode(image, "JPEG")
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Picture(path.name, uri, image.width, image.height)


def _shown_sample(entry: Any, where: str, folder: Path) -> ShownSample:
    if not isinstance(entry, dict) or not {"question", "truth"} <= entry.keys():
        raise use_error(where, f"{entry!r:.80}", "an object with question and truth", "add what is missing")
    truth = str(entry["truth"])
    return ShownSample(
        sample_id=str(entry.get("id", "")),
        task=str(entry.get("task") or ""),
        pictures=tuple(embed_image(folder / image) for image in entry.get("images") or ()),
        question=str(entry["question"]),
        truth=truth,
        before=_answer(entry.get("before"), truth, "before training"),
        after=_answer(entry.get("after"), truth, "after training"),
    )


def _answer(text: Any, truth: str, when: str) -> Answer | None:
    return None if text is None else Answer(when, str(text), str(text).strip() == truth.strip())


def _flatten(image: Image.Image) -> Image.Image:
    """Grey or RGB, whatever came: a page cannot show CMYK or 16 bits, and transparency would show its background."""
    if image.mode in ("L", "RGB"):
        return image.copy()
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if "A" in image.mode or "transparency" in image.info:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, "white")
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("L" if image.mode == "1" else "RGB")


def _encode(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, optimize=True, quality=85)
    return buffer.getvalue()
