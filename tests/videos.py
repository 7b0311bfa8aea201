"""Small video files."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def moving_square(num_frames: int, width_px: int, height_px: int) -> np.ndarray:
    """A bright square that crosses a gradient: uint8 [F, H, W, C]."""
    rows, columns = np.mgrid[:height_px, :width_px]
    frames = np.zeros((num_frames, height_px, width_px, 3), dtype=np.uint8)
    for number in range(num_frames):
        frames[number, ..., 0] = rows * 255 // height_px
        frames[number, ..., 1] = columns * 255 // width_px
        frames[number, ..., 2] = number * 255 // num_frames
        left = number * (width_px - 16) // max(1, num_frames - 1)
        frames[number, 8:24, left : left + 16] = 255
    return frames


def write_video(
    path: Path, num_frames: int = 20, fps: float = 8, width_px: int = 96, height_px: int = 64, codec: str = "mpeg4"
) -> Path:
    """Write a video of a moving square; returns `path`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width_px, height_px, "yuv420p"
        for pixels in moving_square(num_frames, width_px, height_px):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def turn(path: Path, out: Path, degrees: int) -> Path:
    """The same video with a note that a player must turn it (as telephones write it): the MP4's display matrix."""
    data = bytearray(path.read_bytes())
    at = data.rindex(b"tkhd") + 4 + 4 + 5 * 4 + 8 + 4 * 2  # version and flags, times, track, reserved, layer ... volume
    cosine, sine = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    for place, value in ((0, cosine), (4, sine), (12, -sine), (16, cosine)):
        data[at + place : at + place + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    out.write_bytes(data)
    return out
