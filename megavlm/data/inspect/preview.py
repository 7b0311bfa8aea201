"""Rows as the model sees them: tokens with their weights and positions, and the pixels that the patches hold.

Shape suffixes: S tokens of one sample, P patches, C values of a patch, HWC image axes.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from megavlm.config.inputs import Grid
from megavlm.data.encode import SampleEncoder
from megavlm.data.image_spec import ImageSpec
from megavlm.data.image_tiles import tile_arrangement
from megavlm.data.images import read_image_size
from megavlm.data.inspect.rows import read_row
from megavlm.data.media import media_name
from megavlm.data.pixels import load_image_patches
from megavlm.data.sample import EncodedSample, Sample, VideoClip
from megavlm.errors import UseError


@dataclass(frozen=True)
class ShownToken:
    """A token, or a run of the same visual token.

    Attributes:
        text: as the tokenizer decodes it; line breaks are visible.
        kind: `text`, `special` or `visual`.
        count: tokens of the run.
        weight: of predicting it.
        where: number and position, for the pointer.
        breaks: whether the line ends behind it.
    """

    text: str
    kind: str
    count: int
    weight: float
    where: str
    breaks: bool = False


@dataclass(frozen=True)
class ShownFrame:
    """What one frame or tile holds, as a data URI."""

    label: str
    uri: str
    width_px: int
    height_px: int


@dataclass(frozen=True)
class ShownImage:
    """An image or a video as the encoder gets it.

    Attributes:
        name: of the file.
        facts: its own size, the grid of patches, visual tokens.
        whole: frames that show all of it (the image itself, a thumbnail, frames of a video).
        tiles: its tiles, row by row.
        columns: tiles side by side.
    """

    name: str
    facts: str
    whole: tuple[ShownFrame, ...]
    tiles: tuple[ShownFrame, ...] = ()
    columns: int = 1


@dataclass(frozen=True)
class ShownRow:
    """One row; where it cannot be shown, `problem` says why."""

    sample_id: str
    facts: str
    tokens: tuple[ShownToken, ...] = ()
    images: tuple[ShownImage, ...] = ()
    problem: str = ""


def show_row(samples: Sequence[Sample], row: int, encoder: SampleEncoder, max_length: int) -> ShownRow:
    """Encode a row and load its patches; what keeps it from that is shown as its problem.

    Args:
        samples: all rows.
        row: number of the row.
        encoder: for rows of any length.
        max_length: that training would allow.
    """
    sample = read_row(samples, row)
    if isinstance(sample, UseError):
        return ShownRow(f"row {row + 1}", "", problem=str(sample))
    try:
        encoded = encoder.encode(sample)
        images = tuple(_image(encoded, number, encoder) for number in range(len(encoded.images)))
    except UseError as error:
        return ShownRow(sample.sample_id, "", problem=str(error))
    num_visual = int((encoded.tokens_S == encoder.inputs.image_token_id).sum())
    num_learned = int((encoded.loss_weights_S(encoder.token_schedule.last) != 0).sum())
    facts = f"{len(encoded.tokens_S):,} tokens, {num_visual:,} of them visual, {num_learned:,} learned"
    if len(encoded.tokens_S) > max_length:
        facts += f"; longer than max_length {max_length:,}: training leaves it out"
    return ShownRow(sample.sample_id, facts, tuple(show_tokens(encoded, encoder)), images)


def show_tokens(encoded: EncodedSample, encoder: SampleEncoder) -> list[ShownToken]:
    """Tokens in order; runs of visual tokens become one."""
    tokens_S, positions_3S = encoded.tokens_S, encoded.position_ids_3S
    weights_S = encoded.loss_weights_S(encoder.token_schedule.last)
    is_visual = tokens_S == encoder.inputs.image_token_id
    # Images may follow each other without a token in between; each gets a run of its own.
    ends = set(np.cumsum([encoder.inputs.num_image_tokens(grid) for grid in encoded.grids_thw]).tolist())
    shown: list[ShownToken] = []
    start = num_visual = 0
    while start < len(tokens_S):
        stop = start + 1
        if is_visual[start]:
            num_visual += 1
            while num_visual not in ends and stop < len(tokens_S) and is_visual[stop]:
                stop, num_visual = stop + 1, num_visual + 1
        text = encoder.tokenizer.decode([int(tokens_S[start])], skip_special_tokens=False)
        plain = encoder.tokenizer.decode([int(tokens_S[start])], skip_special_tokens=True)
        kind = "visual" if is_visual[start] else "text" if plain else "special"
        shown.append(
            ShownToken(
                text=text.replace("\n", "\u23ce").replace("\t", "\u21e5"),
                kind=kind,
                count=stop - start,
                weight=float(weights_S[start]),
                where=_where(start, stop, int(tokens_S[start]), positions_3S, encoder),
                breaks="\n" in text,
            )
        )
        start = stop
    return shown


def _where(start: int, stop: int, token_id: int, positions_3S: np.ndarray, encoder: SampleEncoder) -> str:
    spans = []
    for axis, name in enumerate(("time", "row", "column")):
        least, most = int(positions_3S[axis, start:stop].min()), int(positions_3S[axis, start:stop].max())
        spans.append(f"{name} {least}" + (f" to {most}" if most > least else ""))
    place = spans[0].removeprefix("time ") if encoder.inputs.position_kind == "linear" else ", ".join(spans)
    numbers = f"token {start}" if stop - start == 1 else f"tokens {start} to {stop - 1}"
    return f"{numbers}, id {token_id}, position {place}"


def _image(encoded: EncodedSample, number: int, encoder: SampleEncoder) -> ShownImage:
    source, grid = encoded.images[number], encoded.grids_thw[number]
    patches_PC = load_image_patches(encoded, number, encoder)
    facts = f"{grid[0]} x {grid[1]} x {grid[2]} patches of {encoder.inputs.patch_px} pixels, "
    facts += f"{encoder.inputs.num_image_tokens(grid):,} visual tokens"
    if isinstance(source, VideoClip):
        assert encoder.video_spec is not None
        pictures = pixels_of(patches_PC, grid, encoder.video_spec.frame, every_frame=True)
        numbers = [*source.frames, *([source.frames[-1]] * (len(pictures) - len(source.frames)))]
        frames = [_frame(picture, f"frame {frame}") for picture, frame in zip(pictures, numbers, strict=True)]
        return ShownImage(media_name(source.path), facts, tuple(frames))
    width_px, height_px = read_image_size(source)
    spec = encoder.image_spec
    pictures = pixels_of(patches_PC, grid, spec)
    facts = f"file {width_px} x {height_px} pixels; {facts}"
    if len(pictures) == 1:
        return ShownImage(media_name(source), facts, (_frame(pictures[0], "as the model sees it"),))
    if spec.kind == "anyres":  # the whole stands in front of its tiles
        whole, tiles, columns = pictures[0], pictures[1:], grid[3]
    else:  # behind them
        limits = spec.image_px, spec.min_tiles, spec.max_tiles
        whole, tiles, columns = pictures[-1], pictures[:-1], tile_arrangement(width_px, height_px, *limits)[0]
    named = [_frame(tile, f"tile {place} of {len(tiles)}") for place, tile in enumerate(tiles, 1)]
    return ShownImage(media_name(source), facts, (_frame(whole, "the whole"),), tuple(named), columns)


def pixels_of(patches_PC: torch.Tensor, grid: Grid, spec: ImageSpec, *, every_frame: bool = False) -> list[np.ndarray]:
    """The pictures that patches were made of: normalising and cutting undone.

    Args:
        patches_PC: float32, of one image or video.
        grid: of it.
        spec: that it was made by.
        every_frame: all frames of a temporal patch, not only the first (a still image is repeated).

    Returns:
        uint8 [H, W, C] of each frame or tile.
    """
    rows, columns = grid[1:3]
    merge = spec.merge_size if spec.kind == "dynamic" else 1
    patch, temporal = spec.patch_px, spec.temporal_patch_size
    blocks = patches_PC.reshape(-1, rows // merge, columns // merge, merge, merge, 3, temporal, patch, patch)
    # -> time, frame, block row, row in block, patch row, block column, column in block, patch column, colour
    blocks = blocks.permute(0, 6, 1, 3, 7, 2, 4, 8, 5)
    if not every_frame:
        blocks = blocks[:, :1]
    frames_FHWC = blocks.reshape(-1, rows * patch, columns * patch, 3).double().numpy()
    pixels_FHWC = (frames_FHWC * np.array(spec.std) + np.array(spec.mean)) / spec.rescale
    return list(np.clip(np.round(pixels_FHWC), 0, 255).astype(np.uint8))


def _frame(pixels_HWC: np.ndarray, label: str) -> ShownFrame:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG", optimize=True)
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return ShownFrame(label, uri, pixels_HWC.shape[1], pixels_HWC.shape[0])
