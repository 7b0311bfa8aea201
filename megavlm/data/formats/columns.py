"""Columns that any row may have beside its conversation: images, objects, tools, channel, weight, label, margin."""

import json
import math
from typing import Any, Literal

from megavlm.data.formats.masks import read_masks
from megavlm.data.formats.turns import PLACEHOLDERS, Conversation, Kind, PartMedia, as_json, row_error
from megavlm.data.numbered_images import has_numbers
from megavlm.data.references import References
from megavlm.data.sample import Box, FrameFiles, Mask, Media, Turn, Video

BOX_PLACEHOLDER = "<bbox>"
REFERENCE_PLACEHOLDER = "<ref-object>"

KEYS: dict[Kind, tuple[str, str]] = {"image": ("images", "image"), "video": ("videos", "video")}
# Columns that change what a row means and that are not read: to skip them would train on something else.
UNREAD_KEYS = (
    "audios",
    "audio",
    "chat_template_kwargs",
    "rejected_videos",
    "rejected_audios",
    "rejected_tools",
    "rejected_objects",
)


class Columns:
    """The columns of one row; those that were read are remembered, and the others are the row's extra columns."""

    def __init__(self, row: dict[str, Any], where: str, references: References, frames_fps: float) -> None:
        """Nothing is read yet.

        Args:
            row: as its file has it.
            where: file and row, for messages.
            references: resolves its images and videos.
            frames_fps: of videos given as lists of pictures.

        Raises:
            UseError: a column that would change what the row means, and that nobody reads.
        """
        self.where = where
        self._row = row
        self._references = references
        self._frames_fps = frames_fps
        self._read: set[str] = set()
        for key in UNREAD_KEYS:
            if row.get(key):
                raise row_error(where, f"`{key}`", "text, images and videos", f"remove `{key}`, or leave the row out")

    def has(self, key: str) -> bool:
        """Whether the column has anything."""
        return self._row.get(key) is not None

    def take(self, key: str) -> Any:
        """What is in a column, None for nothing."""
        self._read.add(key)
        return self._row.get(key)

    def take_one(self, keys: tuple[str, ...]) -> Any:
        """What is in that one of these columns which the row has.

        Raises:
            UseError: it has two of them.
        """
        present = [key for key in keys if self.has(key)]
        if len(present) > 1:
            names = " or ".join(f"`{key}`" for key in keys)
            raise row_error(self.where, f"the keys {sorted(self._row)}", f"exactly one of {names}")
        return self.take(present[0]) if present else None

    def rest(self) -> dict[str, Any]:
        """Columns that nobody has taken."""
        return {key: value for key, value in self._row.items() if key not in self._read}

    def peek_images(self) -> Any:
        """What the row lists as images, not taken."""
        return next((self._row[key] for key in KEYS["image"] if self.has(key)), None)

    def images(self, conversation: Conversation) -> tuple[Media, ...]:
        """The images of a conversation: what parts bring along, and for the rest `images`, in order.

        Raises:
            UseError: not as many as placeholders, or one that cannot be opened.
        """
        return self.images_of(conversation, self.take_one(KEYS["image"]))

    def images_of(self, conversation: Conversation, listed: Any) -> tuple[Media, ...]:
        """As `images`, of another column."""
        values = self._in_order("image", listed, conversation)
        return tuple(self._references.resolve("image", value.value, self.where) for value in values)

    def videos(self, conversation: Conversation) -> tuple[Video, ...]:
        """The videos of a conversation, as `images`.

        Raises:
            UseError: as `images`.
        """
        return tuple(
            self._video(value) for value in self._in_order("video", self.take_one(KEYS["video"]), conversation)
        )

    def count(self, kind: Kind) -> int:
        """How many images or videos the row lists."""
        listed: Any = next((self._row[key] for key in KEYS[kind] if self.has(key)), [])
        return len(listed) if isinstance(listed, list) else 1

    def _video(self, video: PartMedia) -> Video:
        if not isinstance(video.value, list):
            return self._references.resolve("video", video.value, self.where)
        if not video.value:
            raise row_error(self.where, "a video of no frames", "a list of pictures")
        files = tuple(self._references.resolve("image", frame, self.where) for frame in video.value)
        return FrameFiles(files, video.fps or self._frames_fps)

    def _in_order(self, kind: Kind, listed: Any, conversation: Conversation) -> list[PartMedia]:
        listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
        named, placeholder = conversation.named[kind], PLACEHOLDERS[kind]
        if kind == "image" and has_numbers(conversation.turns):
            # Texts name the row's images by number: which of them are shown where is found when the row is encoded.
            if any(one is not None for one in named):
                raise row_error(self.where, "images in parts beside <image:1>", "all images in `images`")
            return [PartMedia(one) for one in listed]
        num_open = named.count(None)
        if kind == "video" and num_open == 1 and len(listed) > 1 and all(isinstance(one, str) for one in listed):
            hint = f"write {placeholder} into the text where each video belongs, or the frames of one as [[...]]"
        else:
            hint = f"write {placeholder} into the text where each {kind} belongs"
        if len(listed) != num_open:
            raise row_error(
                self.where,
                f"{len(listed)} {kind}s and {num_open} {placeholder} placeholders",
                f"as many {kind}s as placeholders",
                hint,
            )
        rest = iter(listed)
        return [one if one is not None else PartMedia(next(rest)) for one in named]

    def boxes(self, turns: list[Turn], num_images: int) -> tuple[Box, ...]:
        """What `objects` says, checked against the placeholders in the texts.

        Raises:
            UseError: not as many as placeholders, or something that is no box.
        """
        objects = self.take("objects")
        if not objects:
            return ()
        known = {"ref", "bbox", "bbox_type", "image_id"}
        if not isinstance(objects, dict) or not {key for key, value in objects.items() if value is not None} <= known:
            raise row_error(self.where, f"`objects` {str(objects)[:80]}", f"an object with {', '.join(sorted(known))}")
        references, corners = objects.get("ref") or [], objects.get("bbox") or []
        unit: Literal["real", "norm1"] = objects.get("bbox_type") or "real"
        numbers = objects.get("image_id") or []
        if unit not in ("real", "norm1"):
            raise row_error(self.where, f"objects.bbox_type {unit!r}", "real (pixels) or norm1 (0 to 1)")
        for name, listed, placeholder in (
            ("ref", references, REFERENCE_PLACEHOLDER),
            ("bbox", corners, BOX_PLACEHOLDER),
        ):
            self._check_objects(name, listed, sum(turn.text.count(placeholder) for turn in turns), placeholder)
        if corners and not num_images:
            raise row_error(self.where, "boxes without an image", "an image that they are in")
        if not all(isinstance(reference, str) for reference in references):
            raise row_error(self.where, f"objects.ref {str(references)[:80]}", "a list of texts")
        if not isinstance(numbers, list) or not all(_is_index(number, num_images) for number in numbers):
            got = f"objects.image_id {str(numbers)[:80]} with {num_images} images"
            raise row_error(self.where, got, "numbers of the row's images, from 0")
        num_boxes = max(len(references), len(corners))
        references = references + [""] * (num_boxes - len(references))
        checked = [self._corners(one, unit) for one in corners] + [()] * (num_boxes - len(corners))
        numbers = numbers + [0] * (num_boxes - len(numbers))
        return tuple(
            Box(reference, one, unit, image)
            for reference, one, image in zip(references, checked, numbers, strict=False)  # image_id may go on
        )

    def _check_objects(self, name: str, listed: Any, num_places: int, placeholder: str) -> None:
        if not isinstance(listed, list):
            raise row_error(self.where, f"objects.{name} of type {type(listed).__name__}", "a list")
        if len(listed) != num_places:
            raise row_error(
                self.where,
                f"{len(listed)} objects.{name} and {num_places} {placeholder} placeholders",
                "as many as placeholders",
                f"write {placeholder} into the text where each belongs",
            )

    def _corners(self, corners: Any, unit: str) -> tuple[float, ...]:
        is_box = isinstance(corners, list) and len(corners) in (2, 4) and all(_is_number(value) for value in corners)
        if is_box and len(corners) == 4:
            is_box = corners[0] <= corners[2] and corners[1] <= corners[3]
        if is_box and unit == "norm1":
            is_box = all(0 <= value <= 1 for value in corners)
        if not is_box:
            expected = "[x1, y1, x2, y2] with x1 <= x2 and y1 <= y2, or [x, y]" + (
                ", each from 0 to 1" if unit == "norm1" else ""
            )
            raise row_error(self.where, f"the box {str(corners)[:80]} in objects.bbox", expected)
        return tuple(float(value) for value in corners)

    def masks(self, turns: list[Turn], num_images: int) -> tuple[Mask, ...]:
        """What `masks` says, checked against the tokens for them in answers.

        Raises:
            UseError: as `read_masks`.
        """
        return read_masks(self.take("masks"), turns, num_images, self.where)

    def tools(self) -> str:
        """Descriptions of functions, as JSON: a list of objects; empty: none.

        Raises:
            UseError: anything else.
        """
        tools = self.take("tools")
        if not tools:
            return ""
        try:
            parsed = json.loads(tools) if isinstance(tools, str) else tools
            # ms-swift also takes a list of texts, each of one function.
            parsed = [json.loads(tool) if isinstance(tool, str) else tool for tool in parsed]
        except (ValueError, TypeError, RecursionError) as error:
            raise row_error(self.where, f"`tools` that are no JSON ({error})", "a list of functions") from error
        if not all(isinstance(tool, dict) for tool in parsed):
            raise row_error(self.where, f"`tools` {str(tools)[:80]}", "a list of functions, each a JSON object")
        return as_json(parsed, self.where)

    def text(self, key: str) -> str:
        """A text; empty where there is none.

        Raises:
            UseError: the column has something else.
        """
        value = self.take(key)
        if value is not None and not isinstance(value, str):
            raise row_error(self.where, f"`{key}` of type {type(value).__name__}", "a text")
        return value or ""

    def weight(self) -> float:
        """Of the row's loss.

        Raises:
            UseError: no number of at least 0.
        """
        value = self.take("weight")
        if value is None:
            return 1.0
        if not _is_number(value) or not 0 <= value < 1e6:
            raise row_error(self.where, f"`weight` {str(value)[:40]!r}", "a number of at least 0")
        return float(value)

    def margin(self) -> float | None:
        """Of a preference row.

        Raises:
            UseError: no number.
        """
        value = self.take("margin")
        if value is not None and not _is_number(value):
            raise row_error(self.where, f"`margin` {str(value)[:40]!r}", "a number")
        return None if value is None else float(value)

    def label(self) -> bool | None:
        """Whether the answer is good (KTO rows); a label that is neither true nor false stays a column."""
        return self.take("label") if isinstance(self._row.get("label"), bool) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_index(value: Any, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count
