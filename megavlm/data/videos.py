"""Frames of videos as patches: of video files, decoded by PyAV, and of lists of pictures, decoded by PIL.

Frames are resized by torch's antialiased filter on bytes, which is what transformers' video processors call.

Shape suffixes: B bytes, P patches, C values of a flattened patch (of frames: colours), H and W pixels.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from megavlm.config.inputs import Grid
from megavlm.data.image_patches import PixelBytes, cut_patches, normalised, patch_format
from megavlm.data.image_spec import ImageSpec
from megavlm.data.images import load_rgb, read_image_size
from megavlm.data.media import media_name, open_media
from megavlm.data.sample import FrameFiles, InlineBytes, Media, Video, VideoClip
from megavlm.data.video_spec import FILTERS, VideoSpec
from megavlm.errors import UseError, use_error

# Playlists and lists of parts pass for videos, and would have FFmpeg open whatever files and addresses they name.
_NOTHING_ELSE = {"protocol_whitelist": "none"}


@dataclass(frozen=True)
class VideoHeader:
    """What a file says of its video, as it will be seen (rotated as its player would)."""

    num_frames: int
    fps: float
    width_px: int
    height_px: int


def read_video_header(video: Video) -> VideoHeader:
    """Number and size of a video's frames; decodes the first one, and counts packets where the file has no number.

    Raises:
        UseError: the file is missing or holds no video; pictures of different sizes.
    """
    if isinstance(video, FrameFiles):
        return _pictures_header(video)
    # What brings its bytes along would stay in memory, with its header.
    return _read_file_header(video) if isinstance(video, InlineBytes) else _kept_file_header(video)


@functools.lru_cache(maxsize=1024)
def _kept_file_header(path: Media) -> VideoHeader:
    return _read_file_header(path)


def _pictures_header(video: FrameFiles) -> VideoHeader:
    sizes = [read_image_size(file) for file in video.files]
    for file, size in zip(video.files, sizes, strict=True):
        if size != sizes[0]:
            got, expected = (f"{width}x{height} pixels" for width, height in (size, sizes[0]))
            raise use_error(media_name(file), f"a frame of {got}", f"{expected}, as the video's first", "resize it")
    return VideoHeader(len(sizes), video.fps, *sizes[0])


def _read_file_header(path: Media) -> VideoHeader:
    import av

    try:
        with open_media(path) as file, av.open(file, "r", options=_NOTHING_ELSE) as container:
            stream = _stream(container, path)
            fps: Fraction | None = stream.average_rate or stream.guessed_rate
            first = next(container.decode(stream), None)
            if first is None or not fps:
                raise _broken(path, "no frames")
            quarter_turn = int(first.rotation) % 180 != 0
            width, height = (first.height, first.width) if quarter_turn else (first.width, first.height)
            num_frames = int(stream.frames)
        if not num_frames:
            with open_media(path) as file, av.open(file, "r", options=_NOTHING_ELSE) as container:
                num_frames = sum(packet.size > 0 for packet in container.demux(_stream(container, path)))
    except (av.FFmpegError, OSError) as error:
        raise _broken(path, str(error)) from error
    return VideoHeader(num_frames, float(fps), width, height)


def _stream(container: Any, path: Media) -> Any:
    if not container.streams.video:
        raise _broken(path, "no video in it")
    return container.streams.video[0]


def _broken(path: Media, reason: str) -> UseError:
    return use_error(
        media_name(path), f"unreadable video ({reason})", "a complete video file", "replace it or drop the row"
    )


def load_video_patches(clip: VideoClip, grid: Grid, spec: VideoSpec) -> torch.Tensor:
    """Decode the frames of a clip into normalised patches.

    Args:
        clip: the file, and which frames.
        grid: from `video_grid`.
        spec: of the family.

    Returns:
        float32 [P, C], frame by frame (temporal patch by temporal patch), each as `images.load_patches` orders it.

    Raises:
        UseError: the file cannot be read, or holds fewer frames than it says.
    """
    patches, num_patches = patch_format(spec.frame, is_video=True), math.prod(grid[:3])
    values_B = torch.empty(num_patches * patches.patch_bytes, dtype=torch.uint8)
    load_video_bytes(clip, grid, spec, values_B)
    return normalised(PixelBytes(values_B, ((patches, num_patches),), patches.patch_channels))


def load_video_bytes(clip: VideoClip, grid: Grid, spec: VideoSpec, out_B: torch.Tensor) -> None:
    """Decode the frames of a clip into patches of bytes (see `image_patches`).

    Args:
        clip: the file, and which frames.
        grid: from `video_grid`.
        spec: of the family.
        out_B: where to write, uint8, of the grid's size.

    Raises:
        UseError: as `load_video_patches`.
    """
    frame, (_, rows, columns, *_) = spec.frame, grid
    seen = (rows * frame.patch_px, columns * frame.patch_px)
    size = (frame.image_px, frame.image_px) if spec.kind == "pooled" else seen
    fill = -len(clip.frames) % frame.temporal_patch_size
    shown = [_resized(pixels_HWC, size, frame) for pixels_HWC in _decoded(clip)]
    cut_patches(shown + shown[-1:] * fill, frame, patch_format(frame, is_video=True), rows, columns, out_B)


def _decoded(clip: VideoClip) -> Iterator[np.ndarray]:
    """The frames that are asked for: uint8 [H, W, C]."""
    if isinstance(clip.path, FrameFiles):
        for number in clip.frames:
            yield np.array(load_rgb(clip.path.files[number]))
        return
    import av

    path = clip.path
    wanted, number = list(clip.frames), -1
    try:
        with open_media(path) as file, av.open(file, "r", options=_NOTHING_ELSE) as container:
            for number, frame in enumerate(container.decode(_stream(container, path))):
                while number == wanted[0]:
                    pixels_HWC = frame.to_ndarray(format="rgb24")
                    yield np.rot90(pixels_HWC, int(frame.rotation) // 90 % 4).copy()
                    wanted.pop(0)
                    if not wanted:
                        return
    except (av.FFmpegError, OSError) as error:
        raise _broken(path, str(error)) from error
    raise _broken(path, f"{number + 1} frames, but frame {wanted[0]} is needed")


def _resized(pixels_HWC: np.ndarray, size: tuple[int, int], spec: ImageSpec) -> np.ndarray:
    """Uint8 [H, W, C] of the wanted height and width."""
    if pixels_HWC.shape[:2] == size:
        return pixels_HWC
    pixels_CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)
    mode = FILTERS[spec.resample]
    resized_CHW = F.interpolate(pixels_CHW[None], size, mode=mode, antialias=True, align_corners=False)[0]
    return resized_CHW.permute(1, 2, 0).numpy()
