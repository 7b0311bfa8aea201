"""An encoded sample without what its row and its grids say as well: what the index keeps of it, a few bytes a token.

Visual tokens that follow one another are kept as one with their number, as the chat template printed them; positions
and the feature of each visual token are computed anew. So a row is rendered and tokenised once, when the index is made.

Shape suffixes: S tokens of one sample, Z tokens with a run of visual ones as one, Y such runs, Q sequences of a row,
G images and videos of a row, U uses of them by its sequences, L videos, F their frames, V visual tokens, M masks.
"""

import dataclasses
import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megavlm.config.inputs import Grid, InputSpec
from megavlm.data.masks import MaskEncoder
from megavlm.data.pairs import feature_rows
from megavlm.data.positions import sample_positions
from megavlm.data.sample import Cut, EncodedMask, EncodedSample, Media, Sample, VideoClip
from megavlm.errors import use_error

# What a record holds behind its head: the largest types first, so that each array is aligned.
_ARRAYS = (
    ("intervals_L", "<f8"),
    ("tokens_Z", "<i4"),
    ("run_lengths_Y", "<i4"),
    ("part_lengths_Q", "<i4"),
    ("sources_G", "<i4"),
    ("num_frames_G", "<i4"),
    ("frames_F", "<i4"),
    ("uses_U", "<i4"),
    ("masks_M3", "<i4"),
    ("scales_Z", "<f4"),
    ("kinds_Z", "<i1"),
)
_HEAD = struct.Struct(f"<d{len(_ARRAYS)}i")


@dataclass(frozen=True)
class CompactSample:
    """What is kept of a row.

    Attributes:
        target: `EncodedSample.target`.
        tokens_Z: int32.
        kinds_Z: int8, kinds of `token_weights.py`.
        scales_Z: float32; empty where all are 1.
        run_lengths_Y: int32 tokens of each run of visual ones.
        part_lengths_Q: int32 tokens of each sequence; empty where there is one.
        sources_G: int32, which of the row's images and videos (`_stills`) each of the encoded sample's is.
        num_frames_G: int32 frames that the model sees of a video; 0 for an image.
        frames_F: int32 their numbers, video by video.
        intervals_L: float64 `VideoClip.interval` of each video.
        uses_U: int32, which image each sequence shows in its order, one sequence behind the other; empty where there
            is one, which shows each once. How many of them a sequence shows, its visual tokens say.
        masks_M3: int32 of each mask the position of its token, and width and height of its image in pixels.
    """

    target: float
    tokens_Z: np.ndarray
    kinds_Z: np.ndarray
    scales_Z: np.ndarray
    run_lengths_Y: np.ndarray
    part_lengths_Q: np.ndarray
    sources_G: np.ndarray
    num_frames_G: np.ndarray
    frames_F: np.ndarray
    intervals_L: np.ndarray
    uses_U: np.ndarray
    masks_M3: np.ndarray

    def to_bytes(self) -> bytes:
        """The record of it."""
        arrays = [np.ascontiguousarray(vars(self)[name].ravel(), dtype) for name, dtype in _ARRAYS]
        return b"".join([_HEAD.pack(self.target, *map(len, arrays)), *(array.tobytes() for array in arrays)])

    @classmethod
    def from_bytes(cls, record: bytes) -> "CompactSample":
        """What `to_bytes` gave."""
        target, *lengths = _HEAD.unpack_from(record)
        arrays, start = {}, _HEAD.size
        for (name, dtype), length in zip(_ARRAYS, lengths, strict=True):
            arrays[name] = np.frombuffer(record, dtype, length, start)
            start += arrays[name].nbytes
        assert start == len(record), "a record ends where its arrays do"
        arrays["masks_M3"] = arrays["masks_M3"].reshape(-1, 3)
        return cls(target, **arrays)


def compact(encoded: EncodedSample, sample: Sample, inputs: InputSpec) -> CompactSample:
    """What to keep of a row.

    Args:
        encoded: the row.
        sample: what was encoded.
        inputs: the family's facts.
    """
    tokens_S, kinds_S, scales_S = encoded.tokens_S, encoded.token_classes_S, encoded.scales_S
    is_image_S = tokens_S == inputs.image_token_id
    goes_on_S = np.zeros(len(tokens_S), dtype=bool)
    goes_on_S[1:] = is_image_S[1:] & is_image_S[:-1]
    goes_on_S[1:] &= (kinds_S[1:] == kinds_S[:-1]) & (scales_S[1:] == scales_S[:-1])
    starts_Z = np.flatnonzero(~goes_on_S)
    lengths_Z = np.diff(starts_Z, append=len(tokens_S))
    stills = _stills(sample)
    clips = [image for image in encoded.images if isinstance(image, VideoClip)]
    return CompactSample(
        target=encoded.target,
        tokens_Z=_int32(tokens_S[starts_Z]),
        kinds_Z=kinds_S[starts_Z],
        scales_Z=scales_S[starts_Z] if (scales_S != 1).any() else scales_S[:0],
        run_lengths_Y=_int32(lengths_Z[is_image_S[starts_Z]]),
        part_lengths_Q=_int32(encoded.part_lengths),
        sources_G=_int32(
            [
                len(stills) + sample.videos.index(image.path) if isinstance(image, VideoClip) else stills.index(image)
                for image in encoded.images
            ]
        ),
        num_frames_G=_int32([len(image.frames) if isinstance(image, VideoClip) else 0 for image in encoded.images]),
        frames_F=_int32([frame for clip in clips for frame in clip.frames]),
        intervals_L=np.array([clip.interval for clip in clips], dtype=np.float64),
        uses_U=_int32(_uses(encoded, inputs)),
        masks_M3=_int32([value for mask in encoded.masks for value in (mask.position, *mask.size)]).reshape(-1, 3),
    )


def expand(
    kept: CompactSample,
    sample: Sample,
    grids: tuple[Grid, ...],
    cut: Cut,
    inputs: InputSpec,
    masks: MaskEncoder | None = None,
) -> EncodedSample:
    """The row as it was encoded, to the last bit.

    Args:
        kept: of the row.
        sample: the row, for its images, videos and masks; its texts are not looked at.
        grids: of its images and videos.
        cut: what was left out of it.
        inputs: the family's facts.
        masks: encodes its masks; None: they are not learned.

    Raises:
        UseError: naming the row: it has fewer images and videos, or fewer masks, than it had.
    """
    counts_Z = np.ones(len(kept.tokens_Z), dtype=np.int64)
    counts_Z[kept.tokens_Z == inputs.image_token_id] = kept.run_lengths_Y
    tokens_S = np.repeat(kept.tokens_Z.astype(np.int64), counts_Z)
    images = _images(kept, sample)
    encoded = EncodedSample(
        sample_id=sample.sample_id,
        tokens_S=tokens_S,
        token_classes_S=np.repeat(kept.kinds_Z, counts_Z),
        scales_S=np.repeat(kept.scales_Z, counts_Z) if len(kept.scales_Z) else np.ones(len(tokens_S), np.float32),
        position_ids_3S=np.zeros((3, 0), np.int64),
        images=images,
        grids_thw=grids,
        cut=cut,
        part_lengths=tuple(kept.part_lengths_Q.tolist()),
        target=kept.target,
    )
    if len(kept.masks_M3):
        encoded = dataclasses.replace(encoded, masks=_masks(kept, sample, encoded, masks))
    if not encoded.part_lengths:
        return dataclasses.replace(encoded, position_ids_3S=sample_positions(tokens_S, images, grids, inputs))
    shown = _by_sequence(kept.uses_U.tolist(), encoded, inputs)
    positions = [
        sample_positions(tokens_S[part], [images[use] for use in uses], [grids[use] for use in uses], inputs)
        for part, uses in zip(encoded.parts, shown, strict=True)
    ]
    return dataclasses.replace(
        encoded,
        position_ids_3S=np.concatenate(positions, axis=1),
        feature_rows_V=feature_rows(grids, kept.uses_U.tolist(), inputs.num_image_tokens) if images else None,
        images_together=sum(not isinstance(images[use], VideoClip) for use in shown[0]),
    )


def _masks(
    kept: CompactSample, sample: Sample, encoded: EncodedSample, masks: MaskEncoder | None
) -> tuple[EncodedMask, ...]:
    assert masks is not None, "an index belongs to its encoder"
    if len(sample.masks) < len(kept.masks_M3):
        raise use_error(
            sample.sample_id,
            f"{len(sample.masks)} masks",
            f"{len(kept.masks_M3)}, as the index says",
            "do not change rows during a run; make the index anew (megavlm data index --rebuild)",
        )
    positions, sizes = kept.masks_M3[:, 0].tolist(), [(width, height) for _, width, height in kept.masks_M3.tolist()]
    return masks.placed(sample.masks[: len(positions)], positions, sizes, encoded)


def _stills(sample: Sample) -> list[Media]:
    """A row's images, in the order in which they are numbered here; its videos are numbered behind them."""
    return [*sample.images, *(sample.rejected_images or ())]


def _int32(values: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def _uses(encoded: EncodedSample, inputs: InputSpec) -> list[int]:
    """Which image each sequence shows: what `pairs.feature_rows` was made of."""
    if encoded.feature_rows_V is None:
        return []
    counts_G = np.array([inputs.num_image_tokens(grid) for grid in encoded.grids_thw])
    starts_G = np.cumsum(counts_G) - counts_G
    uses: list[int] = []
    at = 0
    while at < len(encoded.feature_rows_V):
        uses.append(int(np.searchsorted(starts_G, encoded.feature_rows_V[at])))
        at += int(counts_G[uses[-1]])
    assert list(itertools.chain(*_by_sequence(uses, encoded, inputs))) == uses
    return uses


def _by_sequence(uses: Sequence[int], encoded: EncodedSample, inputs: InputSpec) -> list[list[int]]:
    """Uses of images, shared out to the sequences that show them."""
    rest, shared = list(uses), []
    for part in encoded.parts:
        num_visual, shown = int((encoded.tokens_S[part] == inputs.image_token_id).sum()), []
        while num_visual > 0:
            shown.append(rest.pop(0))
            num_visual -= inputs.num_image_tokens(encoded.grids_thw[shown[-1]])
        assert num_visual == 0, "an image is shown whole"
        shared.append(shown)
    return shared


def _images(kept: CompactSample, sample: Sample) -> tuple[Media | VideoClip, ...]:
    stills, videos = _stills(sample), sample.videos
    frames, intervals = iter(kept.frames_F.tolist()), iter(kept.intervals_L.tolist())
    images: list[Media | VideoClip] = []
    for source, num_frames in zip(kept.sources_G.tolist(), kept.num_frames_G.tolist(), strict=True):
        if num_frames and 0 <= source - len(stills) < len(videos):
            seen = tuple(itertools.islice(frames, num_frames))
            images.append(VideoClip(videos[source - len(stills)], seen, next(intervals)))
        elif not num_frames and source < len(stills):
            images.append(stills[source])
        else:
            raise use_error(
                sample.sample_id,
                f"{len(stills)} images and {len(videos)} videos",
                f"{'a video' if num_frames else 'an image'} at place {source + 1} of them, as the index says",
                "do not change rows or images during a run; make the index anew (megavlm data index --rebuild)",
            )
    return tuple(images)
