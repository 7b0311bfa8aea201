"""The shapes that data takes on its way: a row (Sample), its tokens (EncodedSample), a packed row (Batch).

Shape suffixes: S tokens of one sample, T tokens of one packed row, P patches, C values of a flattened patch,
N images, V visual tokens, 3 the (temporal, height, width) axes.
"""

import dataclasses
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from megavlm.config.inputs import Grid
from megavlm.config.schema import TokenWeights
from megavlm.data.image_patches import PixelBytes
from megavlm.data.token_weights import DEFAULT_WEIGHTS, loss_weights


@dataclass(frozen=True)
class Turn:
    """One message, by `system`, `user`, `assistant`, `tool_call` or `tool` (also `tool_response`).

    `text` keeps `<image>` or `<video>` where one stands, of a `tool_call` it is JSON with name and arguments; `loss` is
    None for the default of its role.
    """

    role: str
    text: str
    loss: bool | None = None
    loss_scale: float = 1.0


@dataclass(frozen=True)
class FileRange:
    """Bytes inside an uncompressed file: a member of a tar shard."""

    path: str
    offset: int
    num_bytes: int
    name: str
    """Of the member, for messages."""


@dataclass(frozen=True)
class ZipMember:
    """A member of a zip archive."""

    path: str
    name: str


@dataclass(frozen=True)
class InlineBytes:
    """Bytes that travel with the row: a data URI, a cell of a table."""

    data: bytes = field(repr=False)
    name: str
    """For messages."""


Media = str | Path | FileRange | ZipMember | InlineBytes
"""Where an image or a video is; in rows, text is the absolute path of a file, or a URL. `media.py` opens them."""


@dataclass(frozen=True)
class FrameFiles:
    """A video as a list of pictures of one size, all of which the model sees."""

    files: tuple[Media, ...]
    fps: float
    """Pictures a second."""


Video = Media | FrameFiles


@dataclass(frozen=True)
class VideoClip:
    """Frames of a video: where it is, and the numbers of the frames that the model sees, ascending."""

    path: Video
    frames: tuple[int, ...]
    interval: float = 1.0
    """Positions between two (temporal patches of) frames, where they follow the time."""


@dataclass(frozen=True)
class Box:
    """A thing in an image that a row names: `objects` of ms-swift rows.

    `reference` is its name, for a `<ref-object>`. `corners`, for a `<bbox>`, are (x1, y1, x2, y2), or (x, y) of a
    point, in `unit`: pixels of the file's image (`real`), or shares of its sides from 0 to 1 (`norm1`). Either may be
    empty: a row may have more names than boxes, or fewer.
    """

    reference: str
    corners: tuple[float, ...]
    unit: Literal["real", "norm1"] = "real"
    image: int = 0
    """Number of the image in the row, from 0."""


@dataclass(frozen=True)
class Mask:
    """The pixels of a thing in an image: what a `<seg>` in an answer stands for; an entry of `masks` of a row.

    Either `polygons`, each (x1, y1, x2, y2, ...) in pixels of the file's image, or `run_lengths` of pixels down the
    columns of an image of `size` (height, width), outside and inside in turn.
    """

    polygons: tuple[tuple[float, ...], ...] = ()
    size: tuple[int, int] = (0, 0)
    run_lengths: tuple[int, ...] = ()
    image: int = 0
    """Number of the image in the row, from 0."""


@dataclass(frozen=True)
class Sample:
    """One row after reading: images and videos stay references, nothing is decoded.

    `sample_id` is `<file>:<row number, from 1>`, which errors name; `extra` keeps the row's other columns (task,
    solution ...), which reward functions get.

    Attributes:
        turns: the conversation; of a preference row the chosen one.
        rejected_turns: of a preference row the whole conversation that is worse; empty where only its images are.
        rejected_images: images of the conversation that is worse; None: the same.
        margin: by how much the chosen answer is better (reward models), where the row says so.
        label: whether the answer is good (KTO rows), where the row says so.
        steps: that the answer is made of, where the row lists them.
        step_labels: whether each of them is right.
        boxes: what the placeholders in the texts stand for: the i-th `<ref-object>` for the name of the i-th, the
            i-th `<bbox>` for its corners; counted anew in the rejected conversation. `boxes.py` writes them.
        masks: what the tokens for masks in its answers stand for, in order.
        tools: JSON descriptions of functions that the template shows to the model; empty: none.
        channel: the row's own name of its task or source; empty: none.
        weight: of the row's loss.
        group: JSON of what `data.group_by` names; rows with the same stay together. Empty: they are not grouped.
    """

    sample_id: str
    turns: tuple[Turn, ...]
    images: tuple[Media, ...] = ()
    videos: tuple[Video, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    rejected_turns: tuple[Turn, ...] = ()
    rejected_images: tuple[Media, ...] | None = None
    margin: float | None = None
    label: bool | None = None
    steps: tuple[str, ...] = ()
    step_labels: tuple[bool, ...] = ()
    boxes: tuple[Box, ...] = ()
    masks: tuple[Mask, ...] = ()
    tools: str = ""
    channel: str = ""
    weight: float = 1.0
    group: str = ""

    @property
    def task(self) -> str:
        """The row's own name of its task or source; empty: none."""
        task = self.extra.get("task")
        return self.channel or (task if isinstance(task, str) else "")


Cut = Literal["", "turns", "answer"]
"""What was left out of a row that is too long: turns, or the end of an answer too; empty: nothing."""


@dataclass(frozen=True)
class EncodedMask:
    """A mask over the visual tokens of an image of its sample.

    Attributes:
        position: of the token that stands for it, among the sample's.
        start: position of the image's first visual token.
        size: of the image, (width, height) in pixels.
        shares_V: float32, share of each visual token's area that it covers.
    """

    position: int
    start: int
    size: tuple[int, int]
    shares_V: np.ndarray


@dataclass(frozen=True)
class EncodedSample:
    """One sample as tokens, its image placeholders expanded; pixels still on disk.

    `token_classes_S[i]` (int8, kinds of `token_weights.py`) and `scales_S[i]` (float32) make the weight of the
    prediction OF token i, when the step is known. `grids_thw` are the patch grids (frames, rows, columns) that the
    images and videos will have, in the order in which they stand in the row. `cut` says what was left out of a row
    that is too long.

    A row may be several sequences one behind the other, e.g. a pair of answers (`pairs.py`): `part_lengths` are their
    lengths in tokens (empty: it is one sequence). Its images are listed once, and `feature_rows_V` says for every
    visual token of all sequences which of their features it takes (None: one after the other). `images_together` is
    the number of still images in one of the sequences, which decides about the tiles of some families (0: all).
    `target` is what the stage wants to know of the row beside its tokens: the margin of a pair. `masks` are those that
    its answers name, where they are learned.
    """

    sample_id: str
    tokens_S: np.ndarray
    token_classes_S: np.ndarray
    scales_S: np.ndarray
    position_ids_3S: np.ndarray
    images: tuple[Media | VideoClip, ...]
    grids_thw: tuple[Grid, ...]
    cut: Cut = ""
    part_lengths: tuple[int, ...] = ()
    feature_rows_V: np.ndarray | None = None
    images_together: int = 0
    target: float = 0.0
    masks: tuple[EncodedMask, ...] = ()

    @property
    def parts(self) -> list[slice]:
        """Where its sequences are among its tokens."""
        borders = list(itertools.accumulate(self.part_lengths or (len(self.tokens_S),), initial=0))
        return [slice(start, end) for start, end in itertools.pairwise(borders)]

    @property
    def num_images_together(self) -> int:
        """Still images that one of its sequences shows."""
        return self.images_together or sum(not isinstance(image, VideoClip) for image in self.images)

    def loss_weights_S(self, weights: TokenWeights = DEFAULT_WEIGHTS) -> np.ndarray:
        """The weight of predicting each token: float32 [S]."""
        return loss_weights(self.token_classes_S, self.scales_S, weights)


@dataclass
class Batch:
    """One packed row of T tokens: no padding but what the layout's alignment needs.

    `grid_thw_N3` are the grids of all its images; `patches_PC` their patches, where pixels travel with the row.

    `labels_T[i]` is the token after i in the same sample, `loss_weights_T[i]` the weight of predicting it
    (0 at a sample's end and on padding; less than 0 of a token that speaks for a wrong step, see `steps.py`).
    `cu_seqlens` (int32) holds the sample borders after padding, from 0 to T; padding at the very end is a segment of
    its own. `position_ids_3T` were computed per sample.
    `real_T` (bool) is False on padding, and everywhere in a row that only fills up a round.
    `patches_PC` may have 0 rows. Nothing here is cut by context parallelism yet.

    Where a sample is several sequences (`num_parts`), each has borders of its own; `feature_rows_V` then says which
    feature of the row's images each visual token takes (None: one after the other). `targets_N` (float32) are what the
    samples' rows say beside their tokens, `references_NQ` (float32) what a reference model says of their sequences.
    `ahead` is what the stage found out about the whole global batch before its step (`LookAhead`), and `first_number`
    the number, in the global batch, of the row's first sample; it is known where the stage looks ahead.
    `noise_seeds_N` (int64) tell steps and rows of training apart, for what is drawn at random.
    `mask_places_M3` (int64) are of each mask the positions, in the row, of the token that stands for it and of its
    image's first visual token, and the number of these; `mask_shares_X` (float32) the shares that masks cover of them,
    one mask behind the other.
    `tasks_N` (int64) are numbers of the samples' tasks, where tasks are told apart; those of none have the next number.
    Of images and their texts `contents_N3` (int64) are the samples' indices in their data set and digests of what they
    show and of what they say, and `matches_E` (bool) says of the sequences behind those of the samples whether their
    text belongs to their images (`matching.py`).
    """

    tokens_T: torch.Tensor
    labels_T: torch.Tensor
    loss_weights_T: torch.Tensor
    position_ids_3T: torch.Tensor
    cu_seqlens: torch.Tensor
    real_T: torch.Tensor
    patches_PC: torch.Tensor
    grid_thw_N3: torch.Tensor
    sample_ids: tuple[str, ...]
    num_real_tokens: int
    pad_token_id: int = 0
    num_parts: int = 1
    feature_rows_V: torch.Tensor | None = None
    targets_N: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    references_NQ: torch.Tensor | None = None
    noise_seeds_N: torch.Tensor | None = None
    mask_places_M3: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 3, dtype=torch.int64))
    mask_shares_X: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    tasks_N: torch.Tensor | None = None
    contents_N3: torch.Tensor | None = None
    matches_E: torch.Tensor | None = None
    ahead: torch.Tensor | None = None
    first_number: int = 0

    def __getstate__(self) -> dict[str, Any]:
        """Small tensors leave a data worker as bytes: to share each as a file of memory costs more than to copy it."""
        return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Back to tensors."""
        for name, value in state.items():
            vars(self)[name] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value


@dataclass(frozen=True)
class MicrobatchOrder:
    """What a rank wants of a microbatch, before anything is loaded.

    Attributes:
        indices: samples of the row, in order.
        images: (sample, number of the image in it) of the images whose pixels the rank wants, in order; they may
            belong to other rows.
        filler: whether all weights are to be 0.
        token_weights: of the kinds of tokens in this step.
        step: of training, from 0, for which images are augmented; negative: they are not.
    """

    indices: tuple[int, ...]
    images: tuple[tuple[int, int], ...] = ()
    filler: bool = False
    token_weights: TokenWeights = DEFAULT_WEIGHTS
    step: int = -1


@dataclass(frozen=True)
class Microbatch:
    """A packed row without pixels, and the patches of the images that were ordered with it.

    Attributes:
        batch: the row.
        pixels: of the images, in the order in which they were ordered; `image_patches.normalised` gives their values.
        left_to_pil: kinds of the images that DALI was to decode and left to PIL, one entry an image.
    """

    batch: Batch
    pixels: PixelBytes
    left_to_pil: tuple[str, ...] = ()

    def pin_memory(self) -> "Microbatch":
        """Copies in page-locked memory, from which a GPU copies faster; torch's DataLoader calls this."""
        tensors: dict[str, Any] = {
            name: value.pin_memory() for name, value in vars(self.batch).items() if torch.is_tensor(value)
        }
        return dataclasses.replace(
            self,
            batch=dataclasses.replace(self.batch, **tensors),
            pixels=dataclasses.replace(self.pixels, values_B=self.pixels.values_B.pin_memory()),
        )
