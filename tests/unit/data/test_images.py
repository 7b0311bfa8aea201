import dataclasses
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from megavlm.data.augment import Draw
from megavlm.data.image_loading import ImageLoading
from megavlm.data.images import load_patches, read_image_size, read_image_spec, target_grid
from megavlm.errors import UseError
from tests.pictures import encoded, photo
from tests.unit.data.conftest import LLAVA_INPUTS, QWEN_INPUTS, draw_image

# Width and height: exact fit, odd sides, too small, too large, long and thin.
SIZES = [(64, 32), (65, 47), (7, 5), (20, 300), (641, 480), (1, 1), (900, 5), (33, 4000)]


@pytest.fixture(scope="module")
def dynamic_spec(qwen_dir):
    return read_image_spec(qwen_dir, QWEN_INPUTS)


@pytest.fixture(scope="module")
def square_spec(llava_dir):
    return read_image_spec(llava_dir, LLAVA_INPUTS)


def load_reference(path):
    with Image.open(path) as image:
        return load_image(image)


def reference_dynamic(path, hf_dir):
    processor = Qwen2VLImageProcessorPil.from_pretrained(hf_dir)
    out = processor(images=[load_reference(path)], return_tensors="pt")
    return out["pixel_values"], tuple(out["image_grid_thw"][0].tolist())


def reference_square(path, hf_dir, patch_px):
    processor = CLIPImageProcessorPil.from_pretrained(hf_dir)
    pixels = processor(images=[load_reference(path)], return_tensors="pt")["pixel_values"]
    # As the patch embedding's convolution sees it: rows of patches, (colour, row, column) in each.
    return torch.nn.functional.unfold(pixels, patch_px, stride=patch_px)[0].T


def assert_like_transformers(path, qwen_dir, llava_dir, dynamic_spec, square_spec):
    expected, grid = reference_dynamic(path, qwen_dir)
    actual = load_patches(path, dynamic_spec)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)  # not a bit of difference
    assert target_grid(dynamic_spec, *read_image_size(path)) == grid
    squares = load_patches(path, square_spec)
    assert torch.equal(squares, reference_square(path, llava_dir, square_spec.patch_px))
    assert target_grid(square_spec, *read_image_size(path)) == (1, 4, 4)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_patches_equal_transformers(tmp_path, width, height, qwen_dir, llava_dir, dynamic_spec, square_spec):
    path = draw_image(tmp_path / "x.png", width, height)
    assert_like_transformers(path, qwen_dir, llava_dir, dynamic_spec, square_spec)


def test_real_photographs_equal_transformers(qwen_dir, llava_dir, dynamic_spec, square_spec):
    datasets = pytest.importorskip("sklearn.datasets")
    folder = Path(datasets.__file__).parent / "images"
    paths = sorted(folder.glob("*.jpg"))
    assert paths
    for path in paths:
        assert_like_transformers(path, qwen_dir, llava_dir, dynamic_spec, square_spec)


MODES = [("P", "png"), ("CMYK", "jpg"), ("L", "png"), ("LA", "png"), ("1", "png"), ("YCbCr", "jpg"), ("L", "jpg")]


@pytest.mark.parametrize(("mode", "suffix"), MODES)
def test_colour_modes_equal_transformers(tmp_path, mode, suffix, qwen_dir, llava_dir, dynamic_spec, square_spec):
    path = draw_image(tmp_path / f"x.{suffix}", 70, 50, mode=mode)
    assert_like_transformers(path, qwen_dir, llava_dir, dynamic_spec, square_spec)


def test_alpha_is_dropped_and_sixteen_bits_clip(tmp_path, qwen_dir, llava_dir, dynamic_spec, square_spec):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 4)).astype(np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "rgba.png")
    Image.fromarray(pixels[..., :3], "RGB").save(tmp_path / "rgb.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 4).save(tmp_path / "deep.png")
    for name in ("rgba.png", "deep.png"):
        assert_like_transformers(tmp_path / name, qwen_dir, llava_dir, dynamic_spec, square_spec)
    assert torch.equal(
        load_patches(tmp_path / "rgba.png", dynamic_spec), load_patches(tmp_path / "rgb.png", dynamic_spec)
    )


def test_first_frame_of_an_animation(tmp_path, qwen_dir, llava_dir, dynamic_spec, square_spec):
    frames = [Image.new("RGB", (50, 40), colour) for colour in ("red", "blue")]
    for name in ("x.gif", "x.png", "x.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert_like_transformers(tmp_path / name, qwen_dir, llava_dir, dynamic_spec, square_spec)
    frames[0].save(tmp_path / "still.gif")
    assert torch.equal(
        load_patches(tmp_path / "x.gif", dynamic_spec), load_patches(tmp_path / "still.gif", dynamic_spec)
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_exif_orientation(tmp_path, orientation, suffix, qwen_dir, llava_dir, dynamic_spec, square_spec):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = draw_image(tmp_path / f"x.{suffix}", 160, 64, exif=exif)
    assert read_image_size(path) == ((64, 160) if orientation >= 5 else (160, 64))
    assert_like_transformers(path, qwen_dir, llava_dir, dynamic_spec, square_spec)


def test_exif_behind_the_pixels_of_a_png(tmp_path, qwen_dir, llava_dir, dynamic_spec, square_spec):
    path = draw_image(tmp_path / "x.png", 160, 64)
    exif = Image.Exif()
    exif[0x0112] = 6
    payload = exif.tobytes().removeprefix(b"Exif\x00\x00")
    chunk = struct.pack(">I", len(payload)) + b"eXIf" + payload + struct.pack(">I", zlib.crc32(b"eXIf" + payload))
    whole = path.read_bytes()
    end = whole.rindex(b"IEND") - 4
    path.write_bytes(whole[:end] + chunk + whole[end:])
    assert read_image_size(path) == (64, 160)
    assert_like_transformers(path, qwen_dir, llava_dir, dynamic_spec, square_spec)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp"])
def test_size_needs_no_pixels(tmp_path, suffix, monkeypatch):
    path = draw_image(tmp_path / f"x.{suffix}", 90, 60)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert read_image_size(path) == (90, 60)


def test_patches_are_normalised_colours_in_merge_blocks(tmp_path, dynamic_spec):
    # 4 x 4 patches, each of one grey level: its place in the picture.
    levels = np.repeat(np.repeat(np.arange(16, dtype=np.uint8).reshape(4, 4), 16, 0), 16, 1)
    Image.fromarray(levels).save(tmp_path / "x.png")
    patches = load_patches(tmp_path / "x.png", dynamic_spec)
    assert (patches == patches[:, :1]).all()
    seen = ((patches[:, 0] * 0.5 + 0.5) * 255).round().int().tolist()
    assert seen == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif"])
def test_truncated_file_is_refused(tmp_path, suffix, dynamic_spec):
    path = draw_image(tmp_path / f"x.{suffix}", 300, 200)
    whole = path.read_bytes()
    for share in (0.2, 0.5, 0.9, 0.99):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UseError, match=rf"x\.{suffix}: got unreadable image"):
            load_patches(path, dynamic_spec)


def test_truncated_file_is_refused_even_where_someone_told_pil_to_guess(tmp_path, dynamic_spec, monkeypatch):
    path = draw_image(tmp_path / "x.jpg", 300, 200)
    path.write_bytes(path.read_bytes()[:3000])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UseError, match="unreadable image"):
        load_patches(path, dynamic_spec)
    assert ImageFile.LOAD_TRUNCATED_IMAGES  # theirs again


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff"])
def test_no_image_is_refused(tmp_path, content, dynamic_spec):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(UseError, match=r"x\.png: got unreadable image"):
        read_image_size(path)
    with pytest.raises(UseError, match=r"x\.png: got unreadable image"):
        load_patches(path, dynamic_spec)


def test_missing_file_and_folder_are_refused(tmp_path, dynamic_spec):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(UseError, match="unreadable image"):
            load_patches(path, dynamic_spec)


def test_image_too_large_to_be_true_is_refused(tmp_path, dynamic_spec, monkeypatch):
    path = draw_image(tmp_path / "x.png", 300, 200)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for read in (lambda: read_image_size(path), lambda: load_patches(path, dynamic_spec)):
        with pytest.raises(UseError, match=r"x\.png: got unreadable image .*decompression bomb") as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_image_of_which_pil_only_warns(tmp_path, dynamic_spec, monkeypatch):
    path = draw_image(tmp_path / "x.png", 300, 200)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 59_999)
    with pytest.raises(UseError, match=r"x\.png: got an image of 300x200 pixels; expected at most .* 59,999 of them"):
        read_image_size(path, 59_999)
    assert read_image_size(path, 60_000) == (300, 200)
    assert len(load_patches(path, dynamic_spec))  # a recipe that allows it gets it


def test_draft_decodes_less_of_a_jpeg_and_changes_little(tmp_path, dynamic_spec, square_spec, monkeypatch):
    """Off by default. Of photographs the difference is 1 to 3 of 255 in the mean (a filter after a filter)."""
    image = photo(0, 600, 420).resize((1200, 840), Image.Resampling.BICUBIC)
    sizes = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: (sizes.append(self.size), load(self))[1])
    exif = Image.Exif()
    exif[0x0112] = 6
    small = dataclasses.replace(dynamic_spec, max_pixels=200 * 280)
    cases = [
        ("JPEG", {}, small, 1, (300, 210)),
        ("JPEG", {"exif": exif}, small, 1, (300, 210)),
        ("JPEG", {}, square_spec, 1, (150, 105)),
        ("JPEG", {}, square_spec, 0.2, (300, 210)),
        ("PNG", {}, small, 1, (1200, 840)),
    ]
    for image_format, options, spec, side, expected in cases:
        (tmp_path / "x").write_bytes(encoded(image, image_format, **options))
        draw = None if side == 1 else Draw(side=side)
        plain = load_patches(tmp_path / "x", spec, draw=draw)
        sizes.clear()
        drafted = load_patches(tmp_path / "x", spec, 1, ImageLoading(jpeg_draft=True), draw=draw)
        assert sizes[0] == expected, (image_format, sizes[0])
        assert drafted.shape == plain.shape
        apart = (drafted - plain).abs().mean() * 255 / 2 if spec is small else torch.tensor(0.0)
        assert torch.equal(drafted, plain) if image_format == "PNG" else apart < 3, (image_format, apart)


def test_extreme_aspect_ratio_is_refused_as_transformers_does(tmp_path, dynamic_spec, qwen_dir):
    path = draw_image(tmp_path / "x.png", 603, 3)
    with pytest.raises(UseError, match=r"603 x 3 pixels; expected an aspect ratio of at most 200"):
        target_grid(dynamic_spec, 603, 3)
    with pytest.raises(UseError, match=r"x\.png: image size: got 603 x 3"):
        load_patches(path, dynamic_spec)
    with pytest.raises(ValueError, match="aspect ratio"):
        reference_dynamic(path, qwen_dir)
    assert target_grid(dynamic_spec, 600, 3)[1] == 2


def changed(hf_dir, tmp_path, **changes):
    config = json.loads((hf_dir / "preprocessor_config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    "spelling",
    [
        {"size": None, "min_pixels": 2048, "max_pixels": 9999},
        {"size": {"min_pixels": 2048, "max_pixels": 9999}},
        {"size": {"shortest_edge": 2048, "longest_edge": 9999}},
    ],
)
def test_spellings_of_the_pixel_limits(tmp_path, qwen_dir, spelling):
    spec = read_image_spec(changed(qwen_dir, tmp_path, **spelling), QWEN_INPUTS)
    assert (spec.min_pixels, spec.max_pixels) == (2048, 9999)
    overridden = read_image_spec(tmp_path, QWEN_INPUTS, min_pixels=1024, max_pixels=4096)
    assert (overridden.min_pixels, overridden.max_pixels) == (1024, 4096)


def test_pixel_limits_bind(tmp_path, qwen_dir):
    spec = read_image_spec(qwen_dir, QWEN_INPUTS, min_pixels=64 * 64, max_pixels=96 * 96)
    assert target_grid(spec, 32, 32) == (1, 4, 4)
    assert target_grid(spec, 1000, 1000) == (1, 6, 6)


def test_processor_config_is_read_where_there_is_no_preprocessor_config(tmp_path, llava_dir):
    config = json.loads((llava_dir / "preprocessor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": config}))
    assert read_image_spec(tmp_path, LLAVA_INPUTS) == read_image_spec(llava_dir, LLAVA_INPUTS)


def test_square_sizes_as_plain_numbers(tmp_path, llava_dir):
    spec = read_image_spec(changed(llava_dir, tmp_path, size=28, crop_size=28), LLAVA_INPUTS)
    assert spec == read_image_spec(llava_dir, LLAVA_INPUTS)


def test_shorter_side_larger_than_the_crop(tmp_path, llava_dir):
    spec = read_image_spec(changed(llava_dir, tmp_path, size={"shortest_edge": 33}), LLAVA_INPUTS)
    path = draw_image(tmp_path / "x.png", 75, 60)
    assert torch.equal(load_patches(path, spec), reference_square(path, tmp_path, 7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_resize": False}, "do_resize: got False"),
        ({"patch_size": 14}, "patch_size: got 14; expected 16"),
        ({"merge_size": 1}, "merge_size: got 1; expected 2"),
        ({"size": {"height": 3, "width": 3}}, "shortest_edge and longest_edge"),
        ({"size": {"shortest_edge": 9, "longest_edge": 3}}, "0 < min_pixels <= max_pixels"),
        ({"image_mean": 0.5}, "image_mean: got 0.5; expected three numbers"),
    ],
)
def test_processor_unlike_the_model_is_refused(tmp_path, qwen_dir, change, message):
    with pytest.raises(UseError, match=message):
        read_image_spec(changed(qwen_dir, tmp_path, **change), QWEN_INPUTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_center_crop": False}, "do_center_crop: got False"),
        ({"crop_size": {"height": 14, "width": 14}}, "crop_size: got .*14.*; expected height and width 28"),
        ({"size": {"height": 28, "width": 28}}, "shortest_edge of at least 28"),
        ({"size": {"shortest_edge": 20}}, "shortest_edge of at least 28"),
    ],
)
def test_square_processor_unlike_the_model_is_refused(tmp_path, llava_dir, change, message):
    with pytest.raises(UseError, match=message):
        read_image_spec(changed(llava_dir, tmp_path, **change), LLAVA_INPUTS)


def test_missing_and_broken_processor_files(tmp_path):
    with pytest.raises(UseError, match="no image processor"):
        read_image_spec(tmp_path, QWEN_INPUTS)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UseError, match=r"preprocessor_config\.json: got .*expected a JSON object"):
        read_image_spec(tmp_path, QWEN_INPUTS)


def test_programs_that_call_themselves_images_are_refused(tmp_path, square_spec):
    """EPS is a program: PIL would hand it to Ghostscript, if that is installed."""
    path = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(path, format="EPS")
    with pytest.raises(UseError, match="unreadable image"):
        read_image_size(path)
    with pytest.raises(UseError, match="unreadable image"):
        load_patches(path, square_spec)
