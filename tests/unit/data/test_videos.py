import dataclasses
import importlib
import json
import sys
import types

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from megavlm.data.image_spec import ImageSpec
from megavlm.data.sample import FrameFiles, VideoClip
from megavlm.data.video_spec import VideoLimits, VideoSpec, read_video_spec, sampled_frames, timestamps_s, video_grid
from megavlm.data.videos import load_video_patches, read_video_header
from megavlm.errors import UseError
from tests.unit.data.conftest import QWEN_INPUTS
from tests.videos import moving_square, turn, write_video

FRAME = ImageSpec("dynamic", 16, 2, 2, 0, 0, 4096, 16384, (0.5,) * 3, (0.5,) * 3, 1 / 255, 3)
STAMPED = VideoSpec(FRAME, "stamped", fps=2.0, min_frames=4, max_frames=12)
TIMED = dataclasses.replace(STAMPED, kind="timed")
POOLED = VideoSpec(
    dataclasses.replace(FRAME, kind="anyres", image_px=64, temporal_patch_size=1), "pooled", 1.0, 1, max_frames=8
)
LENGTHS = [(1, 25.0), (2, 25.0), (3, 8.0), (5, 1.0), (20, 8.0), (75, 25.0), (77, 29.97), (300, 30.0), (1000, 24.0)]


def theirs_module(family):
    """Transformers' video processing; it asks for torchvision, for nothing that is used here."""
    names = ["torchvision", "torchvision.transforms", "torchvision.transforms.v2"]
    names.append("torchvision.transforms.v2.functional")
    with pytest.MonkeyPatch.context() as patch:
        modules = [types.ModuleType(name) for name in names]
        for module, name, inner in zip(modules, names, [*modules[1:], None], strict=True):
            patch.setitem(sys.modules, name, module)
            if inner is not None:
                vars(module)[inner.__name__.rpartition(".")[2]] = inner
        return importlib.import_module(f"transformers.models.{family}.video_processing_{family}")


def theirs(kind, number):
    """A processor of transformers; its constructor would ask for torchvision."""
    if kind == "stamped":
        cls = theirs_module("qwen3_vl").Qwen3VLVideoProcessor
    else:
        cls = theirs_module("qwen2_vl").Qwen2VLVideoProcessor
    processor = cls.__new__(cls)
    vars(processor).update(fps=number.fps, min_frames=number.min_frames, max_frames=number.max_frames, num_frames=None)
    return processor


@pytest.mark.parametrize("spec", [STAMPED, TIMED], ids=lambda spec: spec.kind)
@pytest.mark.parametrize(("num_frames", "fps"), LENGTHS)
def test_the_same_frames_as_transformers(spec, num_frames, fps):
    ours = sampled_frames(spec, num_frames, fps)
    if spec.kind == "timed" and num_frames == 1:
        assert ours.tolist() == [0]  # transformers ends with a division by zero
        return
    expected = theirs(spec.kind, spec).sample_frames(VideoMetadata(total_num_frames=num_frames, fps=fps))
    assert ours.tolist() == np.asarray(expected).tolist()


def test_frames_of_a_pooled_video():
    assert sampled_frames(POOLED, 75, 25.0).tolist() == [0, 25, 50]
    assert sampled_frames(POOLED, 10, 25.0).tolist() == [0]
    assert len(sampled_frames(POOLED, 10_000, 25.0)) == 8


@pytest.mark.parametrize("size", [(96, 64), (640, 360), (20, 300), (33, 31), (1920, 1080)])
@pytest.mark.parametrize("num_frames", [2, 4, 5, 12])
def test_the_same_size_as_transformers(num_frames, size):
    width, height = size
    for spec in (
        STAMPED,
        dataclasses.replace(STAMPED, frame=dataclasses.replace(FRAME, min_pixels=10**6, max_pixels=10**7)),
    ):
        limits = {"min_pixels": spec.frame.min_pixels, "max_pixels": spec.frame.max_pixels}
        expected = theirs_module("qwen3_vl").smart_resize(num_frames, height, width, 2, 32, **limits)
        assert video_grid(spec, num_frames, width, height) == (
            -(-num_frames // 2),
            expected[0] // 16,
            expected[1] // 16,
        )


def test_a_frame_of_a_timed_video_has_an_images_limits():
    assert video_grid(TIMED, 4, 640, 360) == (2, 6, 10)
    assert video_grid(POOLED, 5, 640, 360) == (5, 4, 4, 0, 2, 2)
    with pytest.raises(UseError, match="aspect ratio"):
        video_grid(STAMPED, 4, 10_000, 40)


@pytest.mark.parametrize("frames", [[0, 3, 6, 9], [0, 5, 9], [7]])
def test_the_same_times_as_transformers(frames):
    expected = Qwen3VLProcessor._calculate_timestamps(None, list(frames), 29.97, 2)
    assert timestamps_s(np.array(frames), 29.97, 2) == expected


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "mpeg4"), ("avi", "mpeg4"), ("mkv", "mpeg4"), ("webm", "libvpx")]
)
def test_headers(tmp_path, suffix, codec):
    path = write_video(tmp_path / f"a.{suffix}", num_frames=20, fps=8, codec=codec)
    header = read_video_header(str(path))
    assert (header.num_frames, header.fps, header.width_px, header.height_px) == (20, 8.0, 96, 64)


def unpatched(patches_PC, grid, spec):
    """Patches back to frames [F, H, W, C] in 0..255."""
    steps, rows, columns = grid[:3]
    frame = spec.frame
    merge = frame.merge_size if frame.kind == "dynamic" else 1
    shape = (steps, rows // merge, columns // merge, merge, merge, 3, frame.temporal_patch_size, frame.patch_px, -1)
    video = patches_PC.view(shape).permute(0, 6, 1, 3, 7, 2, 4, 8, 5)
    video = video.reshape(steps * frame.temporal_patch_size, rows * frame.patch_px, columns * frame.patch_px, 3)
    return video * 127.5 + 127.5


@pytest.mark.parametrize("spec", [STAMPED, TIMED, POOLED], ids=lambda spec: spec.kind)
def test_pixels_are_those_of_the_frames(tmp_path, spec):
    """As PIL resizes them, but for a step of 1 of 255 (torch's filter rounds its weights otherwise)."""
    path = write_video(tmp_path / "a.mp4", codec="libx264")
    frames = (0, 6, 13)
    grid = video_grid(spec, len(frames), 96, 64)
    patches_PC = load_video_patches(VideoClip(str(path), frames), grid, spec)
    assert patches_PC.shape == (grid[0] * grid[1] * grid[2], 3 * spec.frame.temporal_patch_size * 16 * 16)
    shown = unpatched(patches_PC, grid, spec)
    original = moving_square(20, 96, 64)
    for number, frame in enumerate(frames):
        size = (shown.shape[2], shown.shape[1])
        resized = np.asarray(Image.fromarray(original[frame]).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
        assert np.abs(shown[number].numpy() - resized).mean() < 4, "lossy, but this frame and no other"
    if spec.frame.temporal_patch_size == 2:
        assert torch.equal(shown[3], shown[2]), "the last frame fills its patch"


def pictures_of(folder, num_frames):
    files = [str(folder / f"{number}.png") for number in range(num_frames)]
    for file, pixels_HWC in zip(files, moving_square(num_frames, 96, 64), strict=True):
        Image.fromarray(pixels_HWC).save(file)
    return FrameFiles(tuple(files), fps=4.0)


@pytest.mark.parametrize("spec", [STAMPED, TIMED, POOLED], ids=lambda spec: spec.kind)
def test_a_list_of_pictures_is_a_video(tmp_path, spec):
    video = pictures_of(tmp_path, 3)
    header = read_video_header(video)
    assert (header.num_frames, header.fps, header.width_px, header.height_px) == (3, 4.0, 96, 64)
    grid = video_grid(spec, 3, 96, 64)
    shown = unpatched(load_video_patches(VideoClip(video, (0, 1, 2)), grid, spec), grid, spec)
    for number, pixels_HWC in enumerate(moving_square(3, 96, 64)):
        size = (shown.shape[2], shown.shape[1])
        resized = np.asarray(Image.fromarray(pixels_HWC).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
        assert np.abs(shown[number].numpy() - resized).max() < 1.01, "lossless, but for rounding"


def test_pictures_of_a_video_have_one_size(tmp_path):
    video = pictures_of(tmp_path, 3)
    Image.new("RGB", (64, 96)).save(video.files[1])
    with pytest.raises(UseError, match=r"1\.png: got a frame of 64x96 pixels; expected 96x64 pixels"):
        read_video_header(video)
    (tmp_path / "2.png").unlink()
    with pytest.raises(UseError, match=r"2\.png: got unreadable image"):
        read_video_header(video)


def test_resizing_is_pils_but_for_rounding():
    from megavlm.data.videos import _resized

    generator = np.random.default_rng(0)
    for size in ((64, 96), (50, 33), (128, 200)):
        pixels_HWC = generator.integers(0, 256, (90, 120, 3), dtype=np.uint8)
        ours = _resized(pixels_HWC, size, FRAME).astype(int)
        pil = np.asarray(Image.fromarray(pixels_HWC).resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(ours - pil).max() <= 1


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_video_is_turned_as_its_player_would(tmp_path, degrees):
    path = write_video(tmp_path / "a.mp4")
    turned = turn(path, tmp_path / "turned.mp4", degrees)
    header = read_video_header(str(turned))
    assert (header.width_px, header.height_px) == ((96, 64) if degrees == 180 else (64, 96))
    grids = [video_grid(POOLED, 1, 96, 64), video_grid(POOLED, 1, header.width_px, header.height_px)]
    before, after = (
        unpatched(load_video_patches(VideoClip(str(file), (3,)), grid, POOLED), grid, POOLED)[0].numpy()
        for file, grid in zip((path, turned), grids, strict=True)
    )
    # A matrix that turns by 90 degrees clockwise is what ffmpeg writes for rotate=90.
    assert np.abs(np.rot90(before, -degrees // 90) - after).mean() < 3


def test_broken_files_are_named(tmp_path):
    path = write_video(tmp_path / "a.mkv")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UseError, match="text.mp4: got unreadable video"):
        read_video_header(str(tmp_path / "text.mp4"))
    with pytest.raises(UseError, match="missing.mp4: got unreadable video"):
        read_video_header(str(tmp_path / "missing.mp4"))
    half = tmp_path / "half.mkv"
    half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UseError, match="half.mkv: got unreadable video .*frame 19 is needed"):
        load_video_patches(VideoClip(str(half), (0, 19)), video_grid(STAMPED, 2, 96, 64), STAMPED)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{folder}/secret.ts\n#EXT-X-ENDLIST\n"),
        ("list.mp4", "ffconcat version 1.0\nfile secret.ts\n"),
    ],
)
def test_a_playlist_opens_no_other_file(tmp_path, monkeypatch, name, text):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "secret.ts")
    (tmp_path / name).write_text(text.format(folder=tmp_path))
    with open(tmp_path / name, "rb") as file, av.open(file, "r") as container:
        assert next(container.decode(video=0)).width == 96, "as FFmpeg would have it"
    with pytest.raises(UseError, match=f"{name}: got unreadable video"):
        read_video_header(str(tmp_path / name))


def test_the_directorys_processor_and_the_recipes_limits(tmp_path):
    inputs = dataclasses.replace(QWEN_INPUTS, video_kind="stamped", video_token_id=9)
    spec = read_video_spec(tmp_path, inputs, FRAME)
    assert (spec.fps, spec.min_frames, spec.max_frames, spec.frame.max_pixels) == (2.0, 4, 768, 768 * 32 * 32)
    config = {"size": {"shortest_edge": 4096, "longest_edge": 25165824}, "fps": 1, "image_mean": [0.1, 0.2, 0.3]}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(config))
    spec = read_video_spec(tmp_path, inputs, FRAME)
    assert (spec.fps, spec.frame.min_pixels, spec.frame.max_pixels) == (1.0, 4096, 25165824)
    assert spec.frame.mean == (0.1, 0.2, 0.3) and spec.frame.std == FRAME.std
    spec = read_video_spec(tmp_path, inputs, FRAME, VideoLimits(4.0, 2, 16, 1024, 65536))
    assert (spec.fps, spec.min_frames, spec.max_frames) == (4.0, 2, 16)
    assert (spec.frame.min_pixels, spec.frame.max_pixels) == (1024, 65536)
    assert read_video_spec(tmp_path, QWEN_INPUTS, FRAME) is None
    for limits, message in (
        (VideoLimits(min_frames=9, max_frames=8), "fps_min_frames <= fps_max_frames"),
        (VideoLimits(min_pixels=9, max_pixels=8), "video_min_pixels <= video_max_pixels"),
    ):
        with pytest.raises(UseError, match=message):
            read_video_spec(tmp_path, inputs, FRAME, limits)
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(config | {"do_resize": False}))
    with pytest.raises(UseError, match="do_resize"):
        read_video_spec(tmp_path, inputs, FRAME)


def test_a_pooled_video_without_a_processor_has_the_towers_size(tmp_path):
    inputs = dataclasses.replace(QWEN_INPUTS, video_kind="pooled", video_token_id=9, image_px=64)
    image = dataclasses.replace(FRAME, kind="anyres", image_px=64, temporal_patch_size=1)
    spec = read_video_spec(tmp_path, inputs, image)
    assert (spec.frame.image_px, spec.fps, spec.max_frames) == (64, 1.0, 32)
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({"size": {"height": 384, "width": 384}}))
    with pytest.raises(UseError, match="height and width 64"):
        read_video_spec(tmp_path, inputs, image)


@pytest.mark.parametrize(
    ("change", "message"), [({"resample": 1}, "resample: got 1"), ({"image_mean": 0.5}, "image_mean: got 0.5")]
)
def test_a_strange_processor_is_one_line(tmp_path, change, message):
    inputs = dataclasses.replace(QWEN_INPUTS, video_kind="stamped", video_token_id=9)
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(change))
    with pytest.raises(UseError, match=message):
        read_video_spec(tmp_path, inputs, FRAME)
