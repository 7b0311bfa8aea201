"""A row (Sample) to tokens with positions (EncodedSample): image headers are read, pixels are not.

Shape suffixes: S tokens of one sample, 3 the (temporal, height, width) axes.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from megavlm.config.inputs import Grid, InputSpec
from megavlm.config.schema import DataConfig
from megavlm.data.boxes import write_boxes
from megavlm.data.coordinates import check_box_tokens
from megavlm.data.cut import TooLongRule, cut_row
from megavlm.data.encode_video import Inset, VideoEncoder
from megavlm.data.image_loading import BY_PIL, ImageLoading, check_resample
from megavlm.data.image_text import ImageTextPrompts, encode_image_text
from megavlm.data.images import ImageSpec, read_image_size, read_image_spec, target_grid
from megavlm.data.marked import encode_marked
from megavlm.data.masks import MaskEncoder, open_mask_encoder
from megavlm.data.media import media_name
from megavlm.data.messages import ANSWER_ROLES
from megavlm.data.numbered_images import show_numbered
from megavlm.data.pairs import PAIR_PARTS, encode_pair
from megavlm.data.positions import sample_positions
from megavlm.data.readers import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from megavlm.data.sample import EncodedSample, FrameFiles, Media, Sample, Turn
from megavlm.data.steps import BY_LINES, StepRule, step_ends, with_steps
from megavlm.data.token_weights import DEFAULT_SCHEDULE, READ, RESPONSE, TokenSchedule
from megavlm.data.tokens import EncodedChat, Tokenizer
from megavlm.data.video_spec import VideoLimits, VideoSpec, read_video_spec
from megavlm.errors import UseError, use_error

RowKind = Literal["conversation", "pair", "marked", "steps", "image_text"]
"""What a row is for a stage: something to learn, a better and a worse answer (`pairs.py`), an answer that is marked
good or bad (`marked.py`), one whose steps are (`steps.py`), or images and their text apart (`image_text.py`)."""
NUM_PARTS: dict[RowKind, int] = {
    "conversation": 1,
    "pair": PAIR_PARTS,
    "marked": PAIR_PARTS,
    "steps": 1,
    "image_text": PAIR_PARTS,
}
"""Sequences of a row."""
NO_PROMPTS = ImageTextPrompts()


class TooLong(Exception):  # noqa: N818 - not an error: the row is dropped and counted
    """A row with more tokens than `max_length`, of which nothing is left: to be dropped and counted.

    Attributes:
        sample_id: the row.
        num_tokens: its length, images included.
    """

    def __init__(self, sample_id: str, num_tokens: int, max_length: int) -> None:
        """Keep what a report needs."""
        super().__init__(f"{sample_id}: {num_tokens} tokens, more than data.max_length {max_length}")
        self.sample_id = sample_id
        self.num_tokens = num_tokens


def open_encoder(
    hf_dir: str | Path,
    inputs: InputSpec,
    max_length: int,
    min_pixels: int = 0,
    max_pixels: int = 0,
    videos: VideoLimits | None = None,
    *,
    box_format: str = "",
    max_image_pixels: int = DataConfig.max_image_pixels,
    template: str = "",
    too_long: TooLongRule = "drop",
    schedule: TokenSchedule = DEFAULT_SCHEDULE,
    loading: ImageLoading = BY_PIL,
    row_kind: RowKind = "conversation",
    step_rule: StepRule = BY_LINES,
    prompts: ImageTextPrompts = NO_PROMPTS,
    with_masks: bool = False,
) -> "SampleEncoder":
    """The encoder of a Hugging Face directory.

    Args:
        hf_dir: holds tokenizer, chat template and processors.
        inputs: the family's facts.
        max_length: longest sample in tokens, images included.
        min_pixels: least area of an image; 0: what the directory says.
        max_pixels: largest area of an image; 0: what the directory says.
        videos: what the recipe says of videos.
        box_format: how `objects` of rows are written; empty: rows with them are refused.
        max_image_pixels: largest image, before it is resized.
        template: chat template instead of the directory's own, see `templates.template_text`.
        too_long: what becomes of a row that is longer than max_length.
        schedule: weights of the kinds of tokens.
        loading: how images are decoded.
        row_kind: what becomes of a row.
        step_rule: how its steps are told apart, where it has some.
        prompts: of rows of images and their text.
        with_masks: whether masks of rows are learned.

    Raises:
        UseError: one of them is missing, or unlike the model.
    """
    check_box_tokens(box_format, Path(hf_dir))
    image_spec = read_image_spec(hf_dir, inputs, min_pixels, max_pixels)
    check_resample(loading, image_spec.resample)
    tokenizer = Tokenizer(hf_dir, inputs.image_token_id, inputs.has_borders, template, schedule.reads_prompts)
    video_spec = read_video_spec(hf_dir, inputs, image_spec, videos)
    return SampleEncoder(
        inputs,
        image_spec,
        tokenizer,
        max_length,
        video_spec,
        box_format=box_format,
        max_image_pixels=max_image_pixels,
        too_long=too_long,
        schedule=schedule,
        loading=loading,
        row_kind=row_kind,
        step_rule=step_rule,
        prompts=prompts,
        masks=open_mask_encoder(hf_dir, inputs, image_spec) if with_masks else None,
    )


class SampleEncoder:
    """Encodes rows for one model family; the same row always gives the same tokens."""

    def __init__(
        self,
        inputs: InputSpec,
        image_spec: ImageSpec,
        tokenizer: Tokenizer,
        max_length: int,
        video_spec: VideoSpec | None = None,
        *,
        box_format: str = "",
        max_image_pixels: int = DataConfig.max_image_pixels,
        too_long: TooLongRule = "drop",
        schedule: TokenSchedule = DEFAULT_SCHEDULE,
        loading: ImageLoading = BY_PIL,
        row_kind: RowKind = "conversation",
        step_rule: StepRule = BY_LINES,
        prompts: ImageTextPrompts = NO_PROMPTS,
        masks: MaskEncoder | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            inputs: the family's facts.
            image_spec: how its images are resized, which decides how many tokens they take.
            tokenizer: made for the same image placeholder.
            max_length: longest sample in tokens, images included.
            video_spec: how it takes frames of videos; None: it takes none.
            box_format: how `objects` of rows are written; empty: rows with them are refused.
            max_image_pixels: largest image, before it is resized.
            too_long: what becomes of longer ones.
            schedule: weights of the kinds of tokens over a training.
            loading: how its images are decoded.
            row_kind: what becomes of a row.
            step_rule: how its steps are told apart, where it has some.
            prompts: of rows of images and their text.
            masks: encodes masks of rows; None: they are not learned.
        """
        assert tokenizer.image_token_id == inputs.image_token_id
        self.inputs = inputs
        self.image_spec = image_spec
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.video_spec = video_spec
        self.box_format = box_format
        self.max_image_pixels = max_image_pixels
        self.too_long = too_long
        self.token_schedule = schedule
        self.loading = loading
        self.row_kind = row_kind
        self.step_rule = step_rule
        self.prompts = prompts
        self.masks = masks
        video = VideoEncoder(inputs, video_spec, tokenizer) if video_spec is not None else None
        self.video = video if video is not None and video.token else None

    @property
    def fingerprint(self) -> str:
        """Everything that decides about tokens, weights and grids, as hexadecimal digits."""
        facts = (
            self.inputs,
            self.image_spec,
            self.video_spec,
            self.max_length,
            self.box_format,
            self.max_image_pixels,
            self.tokenizer.fingerprint,
            self.too_long,
            self.token_schedule,
            self.row_kind,
            *([self.step_rule] if self.row_kind == "steps" else []),
            *((self.prompts,) if self.row_kind == "image_text" else ()),
            *((self.masks.token_id,) if self.masks is not None else ()),
        )
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def encode(self, sample: Sample, grids: Sequence[Grid] = ()) -> EncodedSample:
        """What becomes of a row: its conversation, or both conversations of a pair.

        Args:
            sample: the row.
            grids: see `encode_conversation`; those of a pair, which lists its images once, are read again.

        Raises:
            UseError: naming the row: as `encode_conversation`; a row that is no pair where pairs are wanted.
            TooLong: nothing of the row fits into `max_length` tokens.
        """
        if self.row_kind == "pair":
            return encode_pair(sample, self.encode_conversation, self.inputs.num_image_tokens)
        if self.row_kind == "steps":
            return self.encode_conversation(with_steps(sample, self.step_rule), grids)
        if self.row_kind == "marked":
            return encode_marked(sample, self.encode_conversation, self.inputs.num_image_tokens)
        if self.row_kind == "image_text":
            return encode_image_text(sample, self._encode_whole_prompt, self.inputs.num_image_tokens, self.prompts)
        return self.encode_conversation(sample, grids)

    def encode_conversation(self, sample: Sample, grids: Sequence[Grid] = ()) -> EncodedSample:
        """Tokens, their kinds and positions of a row with its answers; a row that is too long may be cut.

        Args:
            sample: the row.
            grids: of its images and videos, in the order in which they stand in the row, where they are known: the
                images' headers are not read again then. Whoever decodes an image sees whether it still has its grid.

        Raises:
            UseError: naming the row: an unreadable image, an image placeholder typed into the text, a template that
                does not fit, a token id that the model does not have, or a row that is too long where that is an error.
            TooLong: nothing of the row fits into `max_length` tokens.
        """
        try:
            self._check_text(sample.turns)
            self._check_videos(sample)
            names = _entities(sample)
            sample = show_numbered(self.with_boxes(sample))
            encoded = self._encode(sample, names, grids)
            num_tokens = len(encoded.tokens_S)
            if num_tokens <= self.max_length:
                return encoded
            if self.too_long == "stop":
                raise self._too_long(num_tokens)
            cut = cut_row(sample, self.max_length, self.too_long, lambda part: self._encode(part, names))
        except UseError as error:
            raise UseError(f"{sample.sample_id}: {error}") from error
        if cut is None:
            raise TooLong(sample.sample_id, num_tokens, self.max_length)
        return cut

    def learns(self, encoded: EncodedSample) -> bool:
        """Whether anything of a row, of a pair both answers, is learned at some time of the training."""
        if self.row_kind == "image_text":
            return True  # not by its tokens
        each = [encoded.loss_weights_S(weights) for weights in self.token_schedule.all]
        return any(all(weights_S[part][1:].any() for part in encoded.parts) for weights_S in each)

    def encode_prompt(self, sample: Sample) -> EncodedSample:
        """The row without its final answer, up to where a model would write one; nothing of it is learned.

        Raises:
            UseError: as in `encode`.
            TooLong: it has more than `max_length` tokens.
        """
        encoded = self.encode_question(sample)
        if len(encoded.tokens_S) > self.max_length:
            raise TooLong(sample.sample_id, len(encoded.tokens_S), self.max_length)
        return encoded

    def encode_question(self, sample: Sample, grids: Sequence[Grid] = ()) -> EncodedSample:
        """The same, however long it is; `grids` as in `encode_conversation`."""
        try:
            sample = show_numbered(self.with_boxes(sample))
            turns = sample.turns
            while turns[-1].role in ANSWER_ROLES:
                turns = turns[:-1]
            self._check_text(turns)
            self._check_videos(sample)
            tokens_S = self.tokenizer.encode_prompt(turns, sample.tools)
            chat = EncodedChat(tokens_S, np.full(len(tokens_S), READ, np.int8), np.ones(len(tokens_S), np.float32))
            return self._finish(sample, chat, grids)
        except UseError as error:
            raise UseError(f"{sample.sample_id}: {error}") from error

    def _encode_whole_prompt(self, sample: Sample) -> EncodedSample:
        """The row without its final answer; one that is too long may be an error."""
        try:
            return self.encode_prompt(sample)
        except TooLong as error:
            if self.too_long == "stop":
                raise UseError(f"{sample.sample_id}: {self._too_long(error.num_tokens)}") from error
            raise

    def _too_long(self, num_tokens: int) -> UseError:
        return use_error(
            "the row",
            f"{num_tokens} tokens",
            f"at most data.max_length {self.max_length}",
            "raise data.max_length, or let data.too_long drop or cut such rows",
        )

    def _encode(self, sample: Sample, names: Sequence[str], grids: Sequence[Grid] = ()) -> EncodedSample:
        steps = step_ends(sample, self.step_rule) if self.row_kind == "steps" else None
        encoded = self._finish(sample, self.tokenizer.encode_chat(sample.turns, sample.tools, names, steps), grids)
        masks = self.masks.encoded(sample, encoded, self._image_size) if self.masks is not None else ()
        return dataclasses.replace(encoded, scales_S=encoded.scales_S * np.float32(sample.weight), masks=masks)

    def with_boxes(self, sample: Sample) -> Sample:
        """The row with what its `objects` say written into its texts, as the recipe's `data.box_format` has it.

        Raises:
            UseError: no format is chosen, a box is outside of its image, or an image is unreadable.
        """
        if not sample.boxes:
            return sample
        sizes = [self._image_size(image) for image in sample.images]
        grids = [target_grid(self.image_spec, *size, len(sizes)) for size in sizes]
        patch_px = self.image_spec.patch_px
        # Of images that are cut into tiles or padded no model was trained with pixels.
        is_resized = self.image_spec.kind == "dynamic"
        if self.box_format.endswith("pixels") and not is_resized:
            raise use_error(
                "data.box_format", self.box_format, "thousandths or numbers with this family", "set e.g. json_1000"
            )
        seen = [(grid[2] * patch_px, grid[1] * patch_px) for grid in grids]
        return write_boxes(sample, self.box_format, sizes, seen)

    def _check_text(self, turns: Sequence[Turn]) -> None:
        tokens = {self.tokenizer.image_token: IMAGE_PLACEHOLDER}
        if self.video is not None:
            tokens[self.video.token] = VIDEO_PLACEHOLDER
        for turn in turns:
            for token, placeholder in tokens.items():
                if token != placeholder and token in turn.text:
                    raise use_error(
                        f"a {turn.role} turn",
                        f"the model's own token {token} in the text",
                        f"{placeholder} where an image or a video stands",
                        "replace or remove it",
                    )

    def _check_videos(self, sample: Sample) -> None:
        if sample.videos and self.video is None:
            raise use_error(
                "the row",
                "a video",
                "images: the model takes nothing else, or its tokenizer has no placeholder for videos",
                "leave the row out",
            )

    def _finish(self, sample: Sample, chat: EncodedChat, grids: Sequence[Grid] = ()) -> EncodedSample:
        tokens_S = chat.tokens_S
        kinds: list[tuple[int, Sequence[object], str]] = [(self.inputs.image_token_id, sample.images, "image")]
        if self.video is not None:  # else the id may be that of a word
            kinds.append((self.inputs.video_token_id, sample.videos, "video"))
        for token_id, paths, word in kinds:
            if int((tokens_S == token_id).sum()) != len(paths):
                raise use_error(
                    "the chat template",
                    f"{int((tokens_S == token_id).sum())} {word} tokens",
                    f"{len(paths)}, one for each {word} of the row",
                    f"use a template that prints every {word} of every turn once",
                )
        images, videos = iter(sample.images), iter(sample.videos)
        insets: list[Inset] = []
        kinds_in_order = tokens_S[self._is_placeholder(tokens_S)].tolist()
        # A row that has another number of them now is found out by its length.
        known = grids if len(grids) == len(kinds_in_order) else [None] * len(kinds_in_order)
        for token_id, grid in zip(kinds_in_order, known, strict=True):
            if token_id == self.inputs.image_token_id:
                insets.append(self._image(next(images), len(sample.images), grid))
            else:
                assert self.video is not None
                video = next(videos)
                for frame in video.files if isinstance(video, FrameFiles) else ():
                    self._image_size(frame)
                insets.append(self.video.inset(video))
        tokens_S, classes_S, scales_S = self._filled(chat, insets)
        if tokens_S.max() >= self.inputs.vocab_size:
            raise use_error(
                "the tokenizer",
                f"token id {int(tokens_S.max())}",
                f"ids below the model's vocabulary size {self.inputs.vocab_size}",
                "use the tokenizer that the model came with",
            )
        shown, their_grids = tuple(inset.source for inset in insets), tuple(inset.grid for inset in insets)
        return EncodedSample(
            sample_id=sample.sample_id,
            tokens_S=tokens_S,
            token_classes_S=classes_S,
            scales_S=scales_S,
            position_ids_3S=sample_positions(tokens_S, shown, their_grids, self.inputs),
            images=shown,
            grids_thw=their_grids,
        )

    def _is_placeholder(self, tokens_S: np.ndarray) -> np.ndarray:
        found_S: np.ndarray = tokens_S == self.inputs.image_token_id
        return found_S | (tokens_S == self.inputs.video_token_id) if self.video is not None else found_S

    def _filled(self, chat: EncodedChat, insets: Sequence[Inset]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, kinds and scales with every placeholder replaced by what stands for it, which is only read."""
        is_placeholder = self._is_placeholder(chat.tokens_S)
        assert not (chat.classes_S[is_placeholder] >= RESPONSE).any(), "images are never learned"
        tokens, classes, scales, start = [], [], [], 0
        for place, inset in zip(np.flatnonzero(is_placeholder).tolist(), insets, strict=True):
            tokens += [chat.tokens_S[start:place], inset.tokens_S]
            classes += [chat.classes_S[start:place], np.full(len(inset.tokens_S), READ, dtype=np.int8)]
            scales += [chat.scales_S[start:place], np.ones(len(inset.tokens_S), dtype=np.float32)]
            start = place + 1
        return (
            np.concatenate([*tokens, chat.tokens_S[start:]]),
            np.concatenate([*classes, chat.classes_S[start:]]),
            np.concatenate([*scales, chat.scales_S[start:]]),
        )

    def _image(self, path: Media, num_images: int, grid: Grid | None) -> Inset:
        if grid is None:
            size = self._image_size(path)
            try:
                grid = target_grid(self.image_spec, *size, num_images)
            except UseError as error:
                raise UseError(f"{media_name(path)}: {error}") from error
        tokens_S = np.full(self.inputs.num_image_tokens(grid), self.inputs.image_token_id, dtype=np.int64)
        if self.inputs.has_borders:
            before, after = np.array(self.tokenizer.image_borders).reshape(2, 1)
            tokens_S = np.concatenate((before, tokens_S, after))
        return Inset(path, grid, tokens_S)

    def _image_size(self, path: Media) -> tuple[int, int]:
        return read_image_size(path, self.max_image_pixels)


def _entities(sample: Sample) -> list[str]:
    """Names that a row gives to things: of its boxes, and in its column `entities`."""
    listed = sample.extra.get("entities")
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    return [*names, *(box.reference for box in sample.boxes)]
