"""A row (Sample) to tokens with positions (EncodedSample): image headers are read, pixels are not.

Shape suffixes: S tokens of one sample, 3 the (temporal, height, width) axes.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megavlm.config.inputs import InputSpec
from megavlm.data.encode_video import Inset, VideoEncoder
from megavlm.data.image_loading import BY_PIL, ImageLoading, check_resample
from megavlm.data.images import ImageSpec, read_image_size, read_image_spec, target_grid
from megavlm.data.media import media_name
from megavlm.data.positions import linear_positions, mrope_positions
from megavlm.data.readers import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from megavlm.data.sample import EncodedSample, Media, Sample, Turn
from megavlm.data.tokens import Tokenizer
from megavlm.data.video_spec import VideoLimits, VideoSpec, read_video_spec
from megavlm.errors import UseError, use_error


class TooLong(Exception):  # noqa: N818 - not an error: the row is dropped and counted
    """A row with more tokens than `max_length`: to be dropped and counted, never cut.

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
    loading: ImageLoading = BY_PIL,
) -> "SampleEncoder":
    """The encoder of a Hugging Face directory.

    Args:
        hf_dir: holds tokenizer, chat template and processors.
        inputs: the family's facts.
        max_length: longest sample in tokens, images included.
        min_pixels: least area of an image; 0: what the directory says.
        max_pixels: largest area of an image; 0: what the directory says.
        videos: what the recipe says of videos.
        loading: how images are decoded.

    Raises:
        UseError: one of them is missing, or unlike the model.
    """
    image_spec = read_image_spec(hf_dir, inputs, min_pixels, max_pixels)
    check_resample(loading, image_spec.resample)
    tokenizer = Tokenizer(hf_dir, inputs.image_token_id, inputs.has_borders)
    video_spec = read_video_spec(hf_dir, inputs, image_spec, videos)
    return SampleEncoder(inputs, image_spec, tokenizer, max_length, video_spec, loading)


class SampleEncoder:
    """Encodes rows for one model family; the same row always gives the same tokens."""

    def __init__(
        self,
        inputs: InputSpec,
        image_spec: ImageSpec,
        tokenizer: Tokenizer,
        max_length: int,
        video_spec: VideoSpec | None = None,
        loading: ImageLoading = BY_PIL,
    ) -> None:
        """Put the parts together.

        Args:
            inputs: the family's facts.
            image_spec: how its images are resized, which decides how many tokens they take.
            tokenizer: made for the same image placeholder.
            max_length: longest sample in tokens, images included.
            video_spec: how it takes frames of videos; None: it takes none.
            loading: how its images are decoded.
        """
        assert tokenizer.image_token_id == inputs.image_token_id
        self.inputs = inputs
        self.image_spec = image_spec
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.video_spec = video_spec
        self.loading = loading
        video = VideoEncoder(inputs, video_spec, tokenizer) if video_spec is not None else None
        self.video = video if video is not None and video.token else None

    @property
    def fingerprint(self) -> str:
        """Everything that decides about tokens, weights and grids, as hexadecimal digits."""
        facts = (self.inputs, self.image_spec, self.video_spec, self.max_length, self.tokenizer.fingerprint)
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def encode(self, sample: Sample) -> EncodedSample:
        """Tokens, weights and positions of a row with its answers.

        Raises:
            UseError: naming the row: an unreadable image, an image placeholder typed into the text, a template that
                does not fit, a token id that the model does not have.
            TooLong: the row has more than `max_length` tokens.
        """
        try:
            self._check_text(sample.turns)
            self._check_videos(sample)
            tokens_S, weights_S = self.tokenizer.encode_chat(sample.turns)
            return self._finish(sample, tokens_S, weights_S)
        except UseError as error:
            raise UseError(f"{sample.sample_id}: {error}") from error

    def encode_prompt(self, sample: Sample) -> EncodedSample:
        """The row without its final answer, up to where a model would write one; all weights are 0.

        Raises:
            UseError: as in `encode`.
            TooLong: as in `encode`.
        """
        turns = sample.turns[:-1] if sample.turns[-1].role == "assistant" else sample.turns
        try:
            self._check_text(turns)
            self._check_videos(sample)
            tokens_S = self.tokenizer.encode_prompt(turns)
            return self._finish(sample, tokens_S, np.zeros(len(tokens_S), dtype=np.float32))
        except UseError as error:
            raise UseError(f"{sample.sample_id}: {error}") from error

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

    def _finish(self, sample: Sample, tokens_S: np.ndarray, weights_S: np.ndarray) -> EncodedSample:
        kinds = [(self.inputs.image_token_id, sample.images, "image")]
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
        for token_id in tokens_S[self._is_placeholder(tokens_S)]:
            if token_id == self.inputs.image_token_id:
                insets.append(self._image(next(images), len(sample.images)))
            else:
                assert self.video is not None
                insets.append(self.video.inset(next(videos)))
        tokens_S, weights_S = self._filled(sample, tokens_S, weights_S, insets)
        if tokens_S.max() >= self.inputs.vocab_size:
            raise use_error(
                "the tokenizer",
                f"token id {int(tokens_S.max())}",
                f"ids below the model's vocabulary size {self.inputs.vocab_size}",
                "use the tokenizer that the model came with",
            )
        return EncodedSample(
            sample_id=sample.sample_id,
            tokens_S=tokens_S,
            loss_weights_S=weights_S,
            position_ids_3S=self._positions(tokens_S, insets),
            images=tuple(inset.source for inset in insets),
            grids_thw=tuple(inset.grid for inset in insets),
        )

    def _is_placeholder(self, tokens_S: np.ndarray) -> np.ndarray:
        found_S: np.ndarray = tokens_S == self.inputs.image_token_id
        return found_S | (tokens_S == self.inputs.video_token_id) if self.video is not None else found_S

    def _filled(
        self, sample: Sample, tokens_S: np.ndarray, weights_S: np.ndarray, insets: Sequence[Inset]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and weights with every placeholder replaced by what stands for it."""
        is_placeholder = self._is_placeholder(tokens_S)
        assert not weights_S[is_placeholder].any(), "images are never learned"
        num_tokens = len(tokens_S) + sum(len(inset.tokens_S) - 1 for inset in insets)
        if num_tokens > self.max_length:
            raise TooLong(sample.sample_id, num_tokens, self.max_length)
        pieces, weights, start = [], [], 0
        for place, inset in zip(np.flatnonzero(is_placeholder).tolist(), insets, strict=True):
            pieces += [tokens_S[start:place], inset.tokens_S]
            weights += [weights_S[start:place], np.zeros(len(inset.tokens_S), dtype=np.float32)]
            start = place + 1
        return np.concatenate([*pieces, tokens_S[start:]]), np.concatenate([*weights, weights_S[start:]])

    def _image(self, path: Media, num_images: int) -> Inset:
        width_px, height_px = read_image_size(path)
        try:
            grid = target_grid(self.image_spec, width_px, height_px, num_images)
        except UseError as error:
            raise UseError(f"{media_name(path)}: {error}") from error
        tokens_S = np.full(self.inputs.num_image_tokens(grid), self.inputs.image_token_id, dtype=np.int64)
        if self.inputs.has_borders:
            before, after = np.array(self.tokenizer.image_borders).reshape(2, 1)
            tokens_S = np.concatenate((before, tokens_S, after))
        return Inset(path, grid, tokens_S)

    def _positions(self, tokens_S: np.ndarray, insets: Sequence[Inset]) -> np.ndarray:
        if self.inputs.position_kind == "linear":
            return linear_positions(len(tokens_S))
        grids = [grid for inset in insets for grid in inset.placed]
        intervals = [inset.interval for inset in insets for _ in inset.placed]
        return mrope_positions(tokens_S, self.inputs.image_token_id, grids, self.inputs.merge_size, intervals)
