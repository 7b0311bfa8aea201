"""Masks of things in images, as the share of each visual token's area that they cover.

Rows give them as COCO's `segmentation` (arXiv 1405.0312; cocodataset/cocoapi@8c9bcc3, common/maskApi.c): polygons, or
runs of pixels down the columns, whose lengths may be packed into a text. Shares are exact for what is given: areas of
polygons, and of pixels, inside the rectangles that the tokens see of the image.

Shape suffixes: S tokens of one sample, R rows and C columns of an image's visual tokens, V visual tokens of an image
(R * C, row by row), H and W height and width of an image in pixels, P points of a polygon, E its edges, T places where
an edge meets the lines between tokens.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megavlm.config.inputs import Grid, InputSpec
from megavlm.config.tasks import SEGMENT_TOKEN
from megavlm.data.image_spec import ImageSpec
from megavlm.data.image_views import image_views
from megavlm.data.sample import EncodedMask, EncodedSample, Mask, Media, Sample, VideoClip
from megavlm.data.tokens import load_tokenizer
from megavlm.errors import use_error

Size = tuple[int, int]
"""Width and height in pixels."""

_KINDS = ("dynamic", "square", "resized")
_SLACK_PX = 1.0
"""Polygons may be outside of their image by this much: annotations are rounded."""


@dataclass(frozen=True)
class TokenGrid:
    """Where an image's visual tokens lie on it: pixel (x, y) is at (x * scale + offset) tokens, each axis by itself."""

    rows: int
    columns: int
    scale: tuple[float, float]
    offset: tuple[float, float]


@dataclass(frozen=True)
class MaskEncoder:
    """Finds the tokens of masks in encoded rows, and what they cover.

    Attributes:
        inputs: the family's facts.
        image_spec: how its images are resized.
        token_id: of `SEGMENT_TOKEN`.
    """

    inputs: InputSpec
    image_spec: ImageSpec
    token_id: int

    def encoded(
        self, sample: Sample, encoded: EncodedSample, image_size: Callable[[Media], Size]
    ) -> tuple[EncodedMask, ...]:
        """The masks of a row, one for each of its tokens for masks, in order.

        Raises:
            UseError: not as many masks as tokens, or one that does not fit its image.
        """
        positions = np.flatnonzero(encoded.tokens_S == self.token_id).tolist()
        if len(positions) != len(sample.masks):
            raise use_error(
                "the row",
                f"{len(positions)} tokens {SEGMENT_TOKEN} and {len(sample.masks)} `masks`",
                f"a mask for each {SEGMENT_TOKEN} of its answers, and none elsewhere",
                "write a segmentation for each into `masks`, or take the token out of the text",
            )
        stills = [image for image in encoded.images if not isinstance(image, VideoClip)]
        sizes = [image_size(stills[mask.image]) for mask in sample.masks]
        return self.placed(sample.masks, positions, sizes, encoded)

    def placed(
        self, masks: Sequence[Mask], positions: Sequence[int], sizes: Sequence[Size], encoded: EncodedSample
    ) -> tuple[EncodedMask, ...]:
        """Masks whose tokens and whose images' sizes are known.

        Raises:
            UseError: one that does not fit its image.
        """
        numbers = [number for number, image in enumerate(encoded.images) if not isinstance(image, VideoClip)]
        counts = [self.inputs.num_image_tokens(grid) for grid in encoded.grids_thw]
        firsts = [0, *itertools.accumulate(counts)]
        visual = np.flatnonzero(encoded.tokens_S == self.inputs.image_token_id)
        placed = []
        for mask, position, size in zip(masks, positions, sizes, strict=True):
            number = numbers[mask.image]
            tokens = token_grid(self.image_spec, self.inputs, size, encoded.grids_thw[number])
            shares_V = mask_shares(mask, size, tokens).ravel()
            assert len(shares_V) == counts[number], "a share for each visual token"
            placed.append(EncodedMask(position, int(visual[firsts[number]]), size, shares_V))
        return tuple(placed)


def open_mask_encoder(hf_dir: str | Path, inputs: InputSpec, image_spec: ImageSpec) -> MaskEncoder:
    """The encoder of masks for a Hugging Face directory.

    Raises:
        UseError: the tokenizer has no token for masks, or the family's visual tokens are no plain grid of the image.
    """
    check_visual_tokens(inputs)
    return MaskEncoder(inputs, image_spec, segment_token_id(Path(hf_dir)))


def check_visual_tokens(inputs: InputSpec) -> None:
    """Raise `UseError` unless a family's visual tokens are a plain grid of the image."""
    if inputs.image_kind not in _KINDS or inputs.num_queries:
        kind = "learned queries" if inputs.num_queries else f"images as {inputs.image_kind}"
        raise use_error(
            "sft.mask_loss_coeff",
            f"a family with {kind}",
            "visual tokens that are a plain grid over the image (Qwen-VL, LLaVA-1.5)",
            "set sft.mask_loss_coeff=0, or use another family",
        )


@functools.lru_cache(maxsize=4)
def segment_token_id(hf_dir: Path) -> int:
    """Id of the token that stands for a mask.

    Raises:
        UseError: the tokenizer does not have it.
    """
    vocabulary: dict[str, int] = load_tokenizer(hf_dir).get_vocab()
    if SEGMENT_TOKEN not in vocabulary:
        raise use_error(
            "model.hf_dir",
            f"{hf_dir}, whose tokenizer has no token {SEGMENT_TOKEN}",
            "one, which sft.mask_loss_coeff reads masks from",
            f"`megavlm add-tokens '{SEGMENT_TOKEN}' --hf-dir {hf_dir} --out DIR`, and set model.hf_dir=DIR",
        )
    return vocabulary[SEGMENT_TOKEN]


def token_grid(spec: ImageSpec, inputs: InputSpec, size: Size, grid: Grid) -> TokenGrid:
    """Where the visual tokens of an image lie on it, after it was resized and cropped."""
    (view,) = image_views(spec, *size, grid[1], grid[2])
    rows, columns = grid[1] // inputs.merge_size, grid[2] // inputs.merge_size
    tokens_a_px = columns / view.canvas[0], rows / view.canvas[1]
    scale = tokens_a_px[0] * view.size[0] / size[0], tokens_a_px[1] * view.size[1] / size[1]
    return TokenGrid(rows, columns, scale, (view.offset[0] * tokens_a_px[0], view.offset[1] * tokens_a_px[1]))


def mask_shares(mask: Mask, size: Size, tokens: TokenGrid) -> np.ndarray:
    """Share of each visual token's area that a mask covers: float32 [R, C].

    Raises:
        UseError: the mask is outside of its image, or of one of another size.
    """
    if not mask.polygons:
        return _pixel_shares(_pixels(mask, size), tokens).astype(np.float32)
    shares_RC = np.zeros((tokens.rows, tokens.columns))
    for polygon in mask.polygons:
        points_P2 = np.array(polygon, dtype=np.float64).reshape(-1, 2)
        if (points_P2 < -_SLACK_PX).any() or (points_P2 > np.array(size) + _SLACK_PX).any():
            raise use_error(
                "a polygon of `masks`",
                f"points up to {points_P2.max(0).tolist()} (from {points_P2.min(0).tolist()})",
                f"points within the image of {size[0]}x{size[1]} pixels",
                "correct the polygon, or its image_id",
            )
        points_P2 = points_P2.clip(0, size) * tokens.scale + tokens.offset
        shares_RC += polygon_shares(points_P2, tokens.rows, tokens.columns)
    return shares_RC.clip(0, 1).astype(np.float32)


def polygon_shares(points_P2: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Area of a polygon within each square of a grid of unit squares: float64 [R, C].

    Edges are cut where they meet the lines of the grid. A piece that goes down by dy inside of a square covers the part
    of the square to its right, and the squares farther right by dy; a piece that goes up takes as much away.

    Args:
        points_P2: float64, x and y; the last one is joined to the first.
        rows: R.
        columns: C.
    """
    starts_E2, steps_E2 = points_P2, np.roll(points_P2, -1, axis=0) - points_P2
    with np.errstate(divide="ignore", invalid="ignore"):
        meets = [
            (np.arange(count + 1) - starts_E2[:, axis, None]) / steps_E2[:, axis, None]
            for axis, count in enumerate((columns, rows))
        ]
    inner_ET = np.nan_to_num(np.concatenate(meets, axis=1), nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1)
    ends_E2 = np.tile(np.array([0.0, 1.0]), (len(points_P2), 1))
    cuts_ET = np.sort(np.concatenate((ends_E2, inner_ET), axis=1), axis=1)
    middles_ET = (cuts_ET[:, 1:] + cuts_ET[:, :-1]) / 2
    x, y = (starts_E2[:, axis, None] + steps_E2[:, axis, None] * middles_ET for axis in (0, 1))
    dy = steps_E2[:, 1, None] * np.diff(cuts_ET, axis=1)
    counts = (dy != 0) & (y > 0) & (y < rows) & (x < columns)
    x, y, dy = x[counts].clip(min=0), y[counts], dy[counts]
    column, row = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    width = columns + 1
    added = np.bincount(row * width + column, dy * (column + 1 - x), rows * width)
    added += np.bincount(row * width + column + 1, dy * (x - column), rows * width)
    covered_RC: np.ndarray = np.abs(added.reshape(rows, width).cumsum(axis=1)[:, :columns])
    return covered_RC


def _pixels(mask: Mask, size: Size) -> np.ndarray:
    """Pixels of a mask of runs: bool [H, W]."""
    if mask.size != size[::-1]:
        raise use_error(
            "a run-length encoding of `masks`",
            f"size {list(mask.size)}",
            f"{[size[1], size[0]]}: height and width of its image in pixels",
            "correct the size, or its image_id",
        )
    is_inside = np.arange(len(mask.run_lengths)) % 2 == 1
    return np.repeat(is_inside, mask.run_lengths).reshape(size).T


def _pixel_shares(pixels_HW: np.ndarray, tokens: TokenGrid) -> np.ndarray:
    """Share of each token's area that pixels cover: float64 [R, C]."""
    shares = pixels_HW
    for axis, count, scale, offset in (
        (0, tokens.rows, tokens.scale[1], tokens.offset[1]),
        (1, tokens.columns, tokens.scale[0], tokens.offset[0]),
    ):
        length = shares.shape[axis]
        borders = ((np.arange(count + 1) - offset) / scale).clip(0, length)
        before = np.minimum(np.floor(borders).astype(np.int64), length - 1)
        sums = np.concatenate(
            (np.zeros_like(shares[:1] if axis == 0 else shares[:, :1], float), shares.cumsum(axis)), axis
        )
        inside = np.expand_dims(borders - before, 1 - axis) * np.take(shares, before, axis)
        shares = np.diff(np.take(sums, before, axis) + inside, axis=axis) * scale
    return shares
