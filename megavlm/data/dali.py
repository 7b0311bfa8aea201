"""NVIDIA DALI decodes and resizes images: the only place that imports it.

Its dynamic mode is used, a few images at a time; where one of them is broken, which fails them all, each on its own.
Decoded JPEG and PNG files equal PIL's bit for bit. Resized ones do not: at an image's borders PIL leaves out what a
filter would read outside of it where DALI repeats the outermost pixels, and results are rounded in another order.

On a CPU this is tested; on a GPU (`device="gpu"`: nvJPEG and CUDA kernels) only the calls' arguments are checked.

Shape suffixes: HWC image axes.
"""

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image, PngImagePlugin

from megavlm.data.image_loading import DALI_RESAMPLES
from megavlm.data.image_views import View

Device = Literal["cpu", "gpu"]
Pixels = Any
"""A DALI tensor: uint8 [H, W, C], red, green, blue."""

# EXIF orientation to (swap sides, mirror left and right, mirror top and bottom), in this order.
_ORIENTATIONS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}
# Format to the modes (PIL's) in which DALI's pixels equal PIL's.
_MODES = {"JPEG": ("RGB", "L"), "MPO": ("RGB", "L"), "PNG": ("RGB", "RGBA", "L", "LA", "P", "1")}


def left_to_pil(image: Image.Image, has_late_metadata: bool) -> str:
    """What kind of image this is if PIL has to decode it; empty where DALI gives the same pixels.

    Left to PIL is all but JPEG and PNG; of JPEG what is neither colour nor grey (CMYK); of PNG what has 16 bits,
    several frames, or metadata behind its pixels, where an orientation may hide.

    Args:
        image: opened, not decoded.
        has_late_metadata: whether a PNG has.
    """
    if image.mode not in _MODES.get(image.format or "", ()):
        return f"{image.format} {image.mode}"
    if isinstance(image, PngImagePlugin.PngImageFile):
        if any(";16" in str(tile[3]) for tile in image.tile):
            return f"PNG {image.mode} of 16 bits"
        if image.is_animated:
            return "PNG with several frames"
        if has_late_metadata:
            return "PNG with metadata behind its pixels"
    return ""


@functools.cache
def _dynamic() -> Any:
    """DALI's dynamic mode, with one thread: workers share out the images."""
    import nvidia.dali.experimental.dynamic as dynamic

    dynamic.set_num_threads(1)
    return dynamic


@contextlib.contextmanager
def _at_once(device: Device) -> Iterator[Any]:
    """The dynamic mode, whose operators are done, or have raised, when they return."""
    dynamic = _dynamic()
    with contextlib.ExitStack() as stack:
        stack.enter_context(dynamic.EvalMode.sync_cpu if device == "cpu" else dynamic.EvalMode.sync_full)
        if device == "gpu":
            stack.enter_context(_gpu_context())
        yield dynamic


@functools.cache
def _gpu_context() -> Any:
    return _dynamic().EvalContext(num_threads=1, device_id=int(os.environ.get("LOCAL_RANK", "0")))


def decode_arguments(device: Device) -> dict[str, Any]:
    """Of `decoders.image`. The orientation is applied afterwards: PIL knows more places that hold it."""
    return {"device": device, "adjust_orientation": False}


def resize_arguments(size: tuple[int, int] | Pixels, resample: int) -> dict[str, Any]:
    """Of `resize`, for (height, width), of one image or as a batch of tensors, and PIL's number of a filter."""
    from nvidia.dali import types

    filters = {number: vars(types.DALIInterpType)[name] for number, name in DALI_RESAMPLES.items()}
    return {"size": size, "interp_type": filters[resample], "antialias": True}


def pad_arguments(start: list[int], side: int, colour: tuple[int, int, int]) -> dict[str, Any]:
    """Of `slice`, to pad to a square: `start` is negative where there is padding before the image (row, column)."""
    return {
        "start": start,
        "shape": [side, side],
        "axes": [0, 1],
        "out_of_bounds_policy": "pad",
        "fill_values": list(colour),
    }


def decode_together(files: Sequence[tuple[bytes, int]], device: Device) -> list[Pixels | None]:
    """Decode files as they are to be seen; None where DALI cannot (perhaps PIL can, or says why not).

    Args:
        files: (the whole file, EXIF's orientation of 1 to 8; others are taken for 1) of each.
        device: where to decode.
    """
    if not files:
        return []
    with _at_once(device) as dynamic:
        arrays = [np.frombuffer(data, np.uint8) for data, _ in files]
        try:
            found: list[Pixels | None] = dynamic.decoders.image(
                dynamic.as_batch(arrays), **decode_arguments(device)
            ).tensors
        except RuntimeError:  # nvImageCodec has no finer ones, and one broken file fails all
            if len(files) == 1:
                return [None]
            return [pixels for file in files for pixels in decode_together([file], device)]
        return [_turned(dynamic, pixels, orientation) for pixels, (_, orientation) in zip(found, files, strict=True)]


def _turned(dynamic: Any, pixels: Pixels, orientation: int) -> Pixels:
    swapped, mirrored, upside_down = _ORIENTATIONS.get(orientation, _ORIENTATIONS[1])
    if swapped:
        pixels = dynamic.transpose(pixels, perm=[1, 0, 2], transpose_layout=False)
    if mirrored or upside_down:
        pixels = dynamic.flip(pixels, horizontal=int(mirrored), vertical=int(upside_down))
    return pixels


def as_pixels(values: np.ndarray) -> Pixels:
    """An array for DALI; not copied."""
    return _dynamic().as_tensor(values)


def as_array(pixels: Pixels) -> np.ndarray:
    """Uint8 [H, W, C] in this machine's memory."""
    return np.asarray(pixels.cpu())


def resized_together(images: Sequence[tuple[Pixels, View]], resample: int, device: Device) -> list[np.ndarray]:
    """Images as views want them: uint8 [H, W, C] each.

    PIL rounds to bytes, which cuts off what a filter overshoots, between its horizontal and its vertical pass. Where a
    side grows that shows, so there DALI is made to do the same, in two steps.

    Args:
        images: each decoded, and what is wanted of it.
        resample: PIL's number of the filter.
        device: where the pixels are to be resized.
    """
    with _at_once(device) as dynamic:
        before = [_ready(dynamic, pixels, view, resample, device) for pixels, view in images]
        sizes = [view.size[::-1] for _, view in images]
        others = [number for number, pixels in enumerate(before) if pixels.shape[:2] != sizes[number]]
        if others:
            batch = dynamic.as_batch([before[number] for number in others])
            wanted = dynamic.as_batch([np.array(sizes[number], np.float32) for number in others])
            after = dynamic.resize(batch, **resize_arguments(wanted, resample)).tensors
            for number, pixels in zip(others, after, strict=True):
                before[number] = pixels
        return [as_array(pixels) for pixels in before]


def _ready(dynamic: Any, pixels: Pixels, view: View, resample: int, device: Device) -> Pixels:
    """An image that one more step brings to its size, if it does not have it yet."""
    height, width, _ = pixels.shape
    if device == "gpu":
        pixels = pixels.gpu()
    if view.square is not None:
        side = max(height, width)
        start = [-((side - height) // 2), -((side - width) // 2)]
        pixels = dynamic.slice(pixels, **pad_arguments(start, side, view.square))
        height = width = side
    if (width, height) != view.size and (view.size[0] > width or view.size[1] > height):
        pixels = dynamic.resize(pixels, **resize_arguments((height, view.size[0]), resample))
    return pixels
