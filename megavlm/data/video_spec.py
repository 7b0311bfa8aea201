"""Which frames of a video a model sees, and in which size; read from the model directory's video processor.

The rules are transformers' own for each family; where a directory leaves a choice open (how many frames a second), the
defaults are those of Qwen's and LLaVA's own tools.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megavlm.config.inputs import Grid, InputSpec
from megavlm.data.image_spec import ImageSpec, find_processor_config, target_grid, three_floats
from megavlm.errors import use_error

FILTERS = {2: "bilinear", 3: "bicubic"}
"""torch's name of a resampling filter, by PIL's number."""

_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")


@dataclass(frozen=True)
class VideoLimits:
    """What a recipe says of videos; 0: what the model directory says.

    Attributes:
        fps: frames a second.
        min_frames: fewest frames of a video, where it has as many.
        max_frames: most frames of a video.
        min_pixels: least area: of a frame (Qwen2.5-VL), or of all frames together (Qwen3-VL).
        max_pixels: largest area, likewise.
    """

    fps: float = 0.0
    min_frames: int = 0
    max_frames: int = 0
    min_pixels: int = 0
    max_pixels: int = 0


@dataclass(frozen=True)
class VideoSpec:
    """How one family takes frames of a video.

    Attributes:
        frame: how a frame is resized and normalised.
        kind: `InputSpec.video_kind`.
        fps: frames a second.
        min_frames: fewest frames, where the video has as many.
        max_frames: most frames.
    """

    frame: ImageSpec
    kind: str
    fps: float
    min_frames: int
    max_frames: int


_QWEN = {"fps": 2.0, "min_frames": 4, "max_frames": 768}
# By kind: keys of the processor's file where it leaves them out. Pixels: transformers' classes.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "timed": _QWEN | {"size": {"shortest_edge": 128 * 28**2, "longest_edge": 768 * 28**2}},
    "stamped": _QWEN | {"size": {"shortest_edge": 128 * 32**2, "longest_edge": 768 * 32**2}},
    "pooled": {"fps": 1.0, "min_frames": 1, "max_frames": 32, "size": None},
}


def read_video_spec(
    hf_dir: str | Path, inputs: InputSpec, image: ImageSpec, limits: VideoLimits | None = None
) -> VideoSpec | None:
    """Read the video processor of a Hugging Face directory; None for a family that takes no videos.

    Args:
        hf_dir: may hold video_preprocessor_config.json, or processor_config.json with a `video_processor` section.
        inputs: the family's facts.
        image: the directory's image processor.
        limits: what the recipe says.

    Raises:
        UseError: a step is switched off, or sizes are unlike the model's.
    """
    if inputs.video_kind == "none":
        return None
    limits = limits or VideoLimits()
    places = ("video_preprocessor_config.json", None), ("processor_config.json", "video_processor")
    where, found = find_processor_config(Path(hf_dir), *places) or (str(hf_dir), {})
    config = {**_DEFAULTS[inputs.video_kind], **{key: value for key, value in found.items() if value is not None}}
    for key in _STEPS:
        if config.get(key, True) is not True:
            raise use_error(f"{where} {key}", config[key], "true", "use the video processor that the model came with")
    if config.get("cap_pixels_per_frame") is True:
        raise use_error(f"{where} cap_pixels_per_frame", "true", "false", "set data.video_max_pixels instead")
    spec = VideoSpec(
        frame=_frame_spec(config, where, inputs, image, limits),
        kind=inputs.video_kind,
        fps=float(limits.fps or config["fps"]),
        min_frames=int(limits.min_frames or config["min_frames"]),
        max_frames=int(limits.max_frames or config["max_frames"]),
    )
    if not 1 <= spec.min_frames <= spec.max_frames:
        raise use_error(
            "data.fps_min_frames, data.fps_max_frames",
            f"{spec.min_frames}, {spec.max_frames}",
            "1 <= fps_min_frames <= fps_max_frames",
            "change one of them",
        )
    return spec


def _frame_spec(
    config: dict[str, Any], where: str, inputs: InputSpec, image: ImageSpec, limits: VideoLimits
) -> ImageSpec:
    size = config["size"]
    numbers: dict[str, Any] = {}
    if inputs.video_kind == "pooled":
        if size is not None and size != {"height": inputs.image_px, "width": inputs.image_px}:
            raise use_error(
                f"{where} size",
                size,
                f"height and width {inputs.image_px}, the vision tower's image_size",
                "make the two files agree",
            )
    else:
        least = limits.min_pixels or config.get("min_pixels") or size.get("shortest_edge")
        most = limits.max_pixels or config.get("max_pixels") or size.get("longest_edge")
        if not isinstance(least, int) or not isinstance(most, int) or not 0 < least <= most:
            raise use_error(
                "data.video_min_pixels, data.video_max_pixels",
                f"{least}, {most}",
                "0 < video_min_pixels <= video_max_pixels",
                f"change them, or the size of {where}",
            )
        numbers = {"min_pixels": least, "max_pixels": most}
    resample = int(config.get("resample", image.resample))
    if resample not in FILTERS:
        raise use_error(f"{where} resample", resample, "2 (bilinear) or 3 (bicubic)", "use the model's own processor")
    return dataclasses.replace(
        image,
        mean=three_floats(config, where, "image_mean", image.mean),
        std=three_floats(config, where, "image_std", image.std),
        rescale=float(config.get("rescale_factor", image.rescale)),
        resample=resample,
        **numbers,
    )


def sampled_frames(spec: VideoSpec, num_frames: int, fps: float) -> np.ndarray:
    """Numbers of the frames that the model sees: int64, ascending.

    Args:
        spec: of the family.
        num_frames: of the video.
        fps: of the video.
    """
    wanted = num_frames / fps * spec.fps
    if spec.kind == "stamped":
        count = min(max(int(wanted), spec.min_frames), spec.max_frames, num_frames)
        return np.linspace(0, num_frames - 1, count).round().astype(np.int64)
    if spec.kind == "timed":
        factor = spec.frame.temporal_patch_size
        most = min(spec.max_frames, num_frames) // factor * factor
        count = int(min(max(wanted, spec.min_frames), most)) // factor * factor
        if not count:  # a video of one frame: it is repeated, as a still image is
            return np.zeros(1, dtype=np.int64)
    else:
        count = min(max(int(wanted), spec.min_frames), spec.max_frames, num_frames)
    return np.arange(0, num_frames, num_frames / count).astype(np.int64)


def video_grid(spec: VideoSpec, num_sampled: int, width_px: int, height_px: int) -> Grid:
    """The patch grid that so many frames of this size will have.

    Raises:
        UseError: sides differ by more than a factor of 200.
    """
    frame = spec.frame
    if spec.kind == "pooled":
        side = frame.image_px // frame.patch_px
        pooled = math.ceil(side / 2)
        return num_sampled, side, side, 0, pooled, pooled
    steps = -(-num_sampled // frame.temporal_patch_size)
    if spec.kind == "stamped":
        factor = frame.patch_px * frame.merge_size
        if min(height_px, width_px) < factor:
            scale = max(factor / height_px, factor / width_px)
            height_px, width_px = int(height_px * scale), int(width_px * scale)
        height_px, width_px = _whole_volume(spec, num_sampled, height_px, width_px)
        return steps, height_px // frame.patch_px, width_px // frame.patch_px
    _, rows, columns = target_grid(frame, width_px, height_px)
    return steps, rows, columns


def _whole_volume(spec: VideoSpec, num_frames: int, height: int, width: int) -> tuple[int, int]:
    """As for an image, but the limits are of all frames together (Qwen3-VL)."""
    frame = spec.frame
    target_grid(frame, width, height)  # the aspect ratio
    factor, temporal = frame.patch_px * frame.merge_size, frame.temporal_patch_size
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    volume = round(num_frames / temporal) * temporal * new_height * new_width
    if volume > frame.max_pixels:
        shrink = math.sqrt(num_frames * height * width / frame.max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif volume < frame.min_pixels:
        grow = math.sqrt(frame.min_pixels / (num_frames * height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def timestamps_s(frames: np.ndarray, fps: float, temporal_patch_size: int) -> list[float]:
    """When each temporal patch is, in seconds: the mean of its first and last frame's time.

    Args:
        frames: numbers of the sampled frames; the last is repeated to fill a patch.
        fps: of the video.
        temporal_patch_size: frames of a patch.
    """
    fill = -len(frames) % temporal_patch_size
    times = np.concatenate((frames, np.repeat(frames[-1:], fill))) / fps
    return [float(part[0] + part[-1]) / 2 for part in times.reshape(-1, temporal_patch_size)]
