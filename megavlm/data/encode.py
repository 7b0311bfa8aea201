"""A row (Sample) to tokens with positions (EncodedSample): image headers are read, pixels are not.

Shape suffixes: S tokens of one sample, 3 the (temporal, height, width) axes.
"""

from collections.abc import Sequence

import numpy as np

from megavlm.config.inputs import Grid, InputSpec
from megavlm.data.images import ImageSpec, read_image_size, target_grid
from megavlm.data.positions import linear_positions, mrope_positions
from megavlm.data.readers import IMAGE_PLACEHOLDER
from megavlm.data.sample import EncodedSample, Sample, Turn
from megavlm.data.tokens import Tokenizer
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


class SampleEncoder:
    """Encodes rows for one model family; the same row always gives the same tokens."""

    def __init__(self, inputs: InputSpec, image_spec: ImageSpec, tokenizer: Tokenizer, max_length: int) -> None:
        """Put the parts together.

        Args:
            inputs: the family's facts.
            image_spec: how its images are resized, which decides how many tokens they take.
            tokenizer: made for the same image placeholder.
            max_length: longest sample in tokens, images included.
        """
        assert tokenizer.image_token_id == inputs.image_token_id
        self.inputs = inputs
        self.image_spec = image_spec
        self.tokenizer = tokenizer
        self.max_length = max_length

    def encode(self, sample: Sample) -> EncodedSample:
        """Tokens, weights and positions of a row with its answers.

        Raises:
            UseError: naming the row: an unreadable image, an image placeholder typed into the text, a template that
                does not fit, a token id that the model does not have.
            TooLong: the row has more than `max_length` tokens.
        """
        try:
            self._check_text(sample.turns)
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
            tokens_S = self.tokenizer.encode_prompt(turns)
            return self._finish(sample, tokens_S, np.zeros(len(tokens_S), dtype=np.float32))
        except UseError as error:
            raise UseError(f"{sample.sample_id}: {error}") from error

    def _check_text(self, turns: Sequence[Turn]) -> None:
        token = self.tokenizer.image_token
        for turn in turns:
            if token != IMAGE_PLACEHOLDER and token in turn.text:
                raise use_error(
                    f"a {turn.role} turn",
                    f"the model's own token {token} in the text",
                    f"{IMAGE_PLACEHOLDER} where an image stands",
                    "replace or remove it",
                )

    def _finish(self, sample: Sample, tokens_S: np.ndarray, weights_S: np.ndarray) -> EncodedSample:
        grids = tuple(self._grid(path, len(sample.images)) for path in sample.images)
        is_image = tokens_S == self.inputs.image_token_id
        assert not weights_S[is_image].any(), "images are never learned"
        if int(is_image.sum()) != len(grids):
            raise use_error(
                "the chat template",
                f"{int(is_image.sum())} image tokens",
                f"{len(grids)}, one for each image of the row",
                "use a template that prints every image of every turn once",
            )
        if self.inputs.has_borders:
            places = np.flatnonzero(is_image)
            around = np.stack((places, places + 1), axis=1).flatten()
            tokens_S = np.insert(tokens_S, around, np.tile(self.tokenizer.image_borders, len(places)))
            weights_S = np.insert(weights_S, around, 0.0)
            is_image = tokens_S == self.inputs.image_token_id
        counts = np.ones(len(tokens_S), dtype=np.int64)
        counts[is_image] = [self.inputs.num_image_tokens(grid) for grid in grids]
        num_tokens = int(counts.sum())
        if num_tokens > self.max_length:
            raise TooLong(sample.sample_id, num_tokens, self.max_length)
        if tokens_S.max() >= self.inputs.vocab_size:
            raise use_error(
                "the tokenizer",
                f"token id {int(tokens_S.max())}",
                f"ids below the model's vocabulary size {self.inputs.vocab_size}",
                "use the tokenizer that the model came with",
            )
        tokens_S, weights_S = np.repeat(tokens_S, counts), np.repeat(weights_S, counts)
        return EncodedSample(
            sample_id=sample.sample_id,
            tokens_S=tokens_S,
            loss_weights_S=weights_S,
            position_ids_3S=self._positions(tokens_S, grids),
            images=sample.images,
            grids_thw=grids,
        )

    def _grid(self, path: str, num_images: int) -> Grid:
        width_px, height_px = read_image_size(path)
        try:
            return target_grid(self.image_spec, width_px, height_px, num_images)
        except UseError as error:
            raise UseError(f"{path}: {error}") from error

    def _positions(self, tokens_S: np.ndarray, grids: Sequence[Grid]) -> np.ndarray:
        if self.inputs.position_kind == "linear":
            return linear_positions(len(tokens_S))
        return mrope_positions(tokens_S, self.inputs.image_token_id, grids, self.inputs.merge_size)
