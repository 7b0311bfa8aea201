"""Video files against transformers' own video processors, which need torchvision (`make test-video`)."""

import importlib.util
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import transformers
from transformers.video_utils import VideoMetadata

from megavlm.data.image_spec import ImageSpec
from megavlm.data.sample import VideoClip
from megavlm.data.video_spec import VideoSpec, sampled_frames, video_grid
from megavlm.data.videos import load_video_patches, read_video_header
from tests.videos import write_video

HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LEAST, MOST = 3136, 300_000
SPECS = {
    "Qwen2VLVideoProcessor": VideoSpec(
        ImageSpec("dynamic", 14, 2, 2, 0, 0, LEAST, MOST, CLIP_MEAN, CLIP_STD, 1 / 255, 3), "timed", 2.0, 4, 768
    ),
    "Qwen3VLVideoProcessor": VideoSpec(
        ImageSpec("dynamic", 16, 2, 2, 0, 0, LEAST, MOST, (0.5,) * 3, (0.5,) * 3, 1 / 255, 3), "stamped", 2.0, 4, 768
    ),
    "LlavaOnevisionVideoProcessor": VideoSpec(
        ImageSpec("anyres", 14, 1, 1, 384, 0, 0, 0, CLIP_MEAN, CLIP_STD, 1 / 255, 3), "pooled", 1.0, 1, 32
    ),
}
# Width, height, frames, frames a second, codec, container.
VIDEOS = [
    (96, 64, 20, 8, "libx264", "mp4"),
    (640, 360, 50, 25, "libx264", "mp4"),
    (334, 502, 31, 30, "mpeg4", "avi"),
    (1280, 720, 12, 12, "libvpx", "webm"),
    (64, 200, 7, 5, "mpeg4", "mkv"),
]


@pytest.mark.skipif(not HAS_TORCHVISION, reason="transformers' video processors need torchvision: make test-video")
@pytest.mark.parametrize("video", VIDEOS, ids=lambda video: f"{video[0]}x{video[1]}.{video[5]}")
@pytest.mark.parametrize("name", SPECS)
def test_pixels_are_equal_to_the_last_bit(name: str, video: tuple, tmp_path: Path) -> None:
    width, height, num_frames, fps, codec, suffix = video
    path = write_video(tmp_path / f"video.{suffix}", num_frames, fps, width, height, codec)
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    header = read_video_header(str(path))
    assert (header.num_frames, header.fps) == (num_frames, fps)
    spec = SPECS[name]
    size = {} if spec.kind == "pooled" else {"size": {"shortest_edge": LEAST, "longest_edge": MOST}}
    processor = getattr(transformers, name)(fps=spec.fps, do_sample_frames=True, **size)
    metadata = VideoMetadata(total_num_frames=num_frames, fps=fps)
    theirs = processor(
        videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)], video_metadata=[metadata], return_tensors="pt"
    )
    sampled = sampled_frames(spec, num_frames, fps)
    assert sampled.tolist() == [int(index) for index in metadata.frames_indices]
    grid = video_grid(spec, len(sampled), header.width_px, header.height_px)
    ours = load_video_patches(VideoClip(str(path), tuple(sampled.tolist())), grid, spec)
    if spec.kind == "pooled":  # whole frames, of which the tower's convolution reads 27 x 14 pixels
        seen = theirs["pixel_values_videos"][0][:, :, : 27 * 14, : 27 * 14]
        expected = seen.reshape(-1, 3, 27, 14, 27, 14).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)
    else:
        assert tuple(theirs["video_grid_thw"][0].tolist()) == grid
        expected = theirs["pixel_values_videos"]
    assert torch.equal(ours, expected)
