"""DALI against PIL: the same pixels decoded, nearly the same resized, and the same refusals."""

import collections
import dataclasses
import inspect
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from megavlm.config.inputs import InputSpec
from megavlm.data import image_loading
from megavlm.data.augment import Draw
from megavlm.data.dataset import Dataset
from megavlm.data.encode import SampleEncoder
from megavlm.data.image_loading import ImageLoading, check_resample, choose_backend
from megavlm.data.image_request import ImageRequest
from megavlm.data.image_spec import ImageSpec
from megavlm.data.images import load_frames, load_patches, read_image_size, read_image_spec
from megavlm.data.loader import BatchLoader
from megavlm.data.rows import Rows
from megavlm.data.sample import MicrobatchOrder
from megavlm.data.tokens import Tokenizer
from megavlm.errors import UseError
from megavlm.platform.capabilities import Capability, probe
from tests.evidence import record, row
from tests.pictures import PHOTO_DIR, PHOTOS, encoded, photo, write_broken, write_pictures
from tests.unit.data.conftest import QWEN_INPUTS, write_jsonl

dali = pytest.importorskip("megavlm.data.dali")
images_by_dali = pytest.importorskip("megavlm.data.images_by_dali")
if not probe("nvidia-dali").available:
    pytest.skip(probe("nvidia-dali").detail, allow_module_level=True)

BY_DALI = ImageLoading(backend="dali")
MOST, MOST_MEAN = 8.0, 0.2  # of 255

SPEC = ImageSpec(
    kind="dynamic",
    patch_px=14,
    temporal_patch_size=1,
    merge_size=1,
    image_px=0,
    resize_px=0,
    min_pixels=0,
    max_pixels=0,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    rescale=1 / 255,
    resample=3,
)
DYNAMIC: dict[str, Any] = {"temporal_patch_size": 2, "merge_size": 2, "min_pixels": 56 * 56}
TILE_SIZES = tuple((384 * rows, 384 * columns) for rows in range(1, 4) for columns in range(1, 4))
# Sizes as the models that are out there have them.
KINDS: dict[str, dict[str, Any]] = {
    "dynamic, nearly as it is": {"kind": "dynamic", "max_pixels": 1280 * 28 * 28, **DYNAMIC},
    "dynamic, shrunk": {"kind": "dynamic", "max_pixels": 128 * 28 * 28, **DYNAMIC},
    "square": {"kind": "square", "image_px": 336, "resize_px": 336},
    "resized": {"kind": "resized", "image_px": 384},
    "tiles": {"kind": "tiles", "image_px": 448, "max_tiles": 12},
    "anyres": {"kind": "anyres", "image_px": 384, "tile_sizes": TILE_SIZES},
    "anyres, padded": {"kind": "anyres", "image_px": 384, "tile_sizes": TILE_SIZES, "tiles_alone": True},
}


def spec_of(kind: str) -> ImageSpec:
    return dataclasses.replace(SPEC, **KINDS[kind])


def levels_apart(ours: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Differences of normalised patches, as levels of 255."""
    assert ours.shape == reference.shape
    std = torch.tensor(SPEC.std).repeat_interleave(ours.shape[1] // 3)
    return ((ours - reference) * std * 255).abs()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize("kind", KINDS)
def test_photographs_are_nearly_as_by_pil(kind: str) -> None:
    largest, means = 0.0, []
    for name in PHOTOS:
        num_images = 2 if kind == "anyres, padded" else 1
        left: list[str] = []
        ours = load_patches(PHOTO_DIR / name, spec_of(kind), num_images, BY_DALI, left_to_pil=left)
        apart = levels_apart(ours, load_patches(PHOTO_DIR / name, spec_of(kind), num_images))
        assert not left
        largest, means = max(largest, float(apart.max())), [*means, float(apart.mean())]
    assert 0 < largest <= MOST + 1e-3 and max(means) <= MOST_MEAN
    rows = [
        row(f"DALI, {kind}: {what}", value, unit="of 255", required=f"<= {most:g}", reference="PIL, real photographs")
        for what, value, most in (("largest difference", largest, MOST), ("mean difference", max(means), MOST_MEAN))
    ]
    record("data", rows)


def test_decoded_pixels_equal_pils_or_are_left_to_pil(pictures: list[Path]) -> None:
    left: collections.Counter[str] = collections.Counter()
    for path in pictures:
        with Image.open(path) as image:
            orientation = int(image.getexif().get(0x0112, 1)) if image.format != "PNG" else 0
            late = path.name == "late-exif.png"
            kind = dali.left_to_pil(image, late)
            if kind:
                left[kind] += 1
                continue
            orientation = orientation or int(Image.Image.getexif(image).get(0x0112, 1))
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        (pixels,) = dali.decode_together([(path.read_bytes(), orientation)], "cpu")
        assert pixels is not None, path.name
        assert np.array_equal(dali.as_array(pixels), expected), path.name
    assert {"GIF P", "PNG I;16", "PNG RGB of 16 bits", "PNG with several frames", "JPEG CMYK"} <= set(left)
    assert "PNG with metadata behind its pixels" in left
    # WebP, BMP, GIF and TIFF are a third of the pictures.
    assert 60 < sum(left.values()) < 120


def test_what_is_left_to_pil_has_pils_pixels_and_is_counted(pictures: list[Path]) -> None:
    spec = dataclasses.replace(SPEC, kind="resized", image_px=56)
    num_left = 0
    for path in pictures:
        left: list[str] = []
        ours, reference = load_patches(path, spec, 1, BY_DALI, left_to_pil=left), load_patches(path, spec)
        assert ours.shape == reference.shape
        if left:
            num_left += 1
            assert torch.equal(ours, reference), path.name
    assert num_left > 60


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    spec = dataclasses.replace(SPEC, kind="resized", image_px=98)
    for image_format in ("JPEG", "PNG"):
        (tmp_path / "x").write_bytes(encoded(photo(1, 150, 90), image_format, exif=exif))
        left: list[str] = []
        ours = load_patches(tmp_path / "x", spec, 1, BY_DALI, left_to_pil=left)
        assert not left and levels_apart(ours, load_patches(tmp_path / "x", spec)).mean() < MOST_MEAN


def test_broken_files_fail_alone_and_say_what_pil_says(tmp_path: Path) -> None:
    spec = spec_of("resized")
    for path in write_broken(tmp_path):
        with pytest.raises(UseError) as by_pil:
            load_patches(path, spec)
        with pytest.raises(UseError) as by_dali:
            load_patches(path, spec, 1, BY_DALI)
        assert str(by_dali.value) == str(by_pil.value)
        load_patches(PHOTO_DIR / PHOTOS[0], spec, 1, BY_DALI)  # the next one is none the worse


@pytest.mark.parametrize("kind", ["resized", "anyres, padded", "dynamic, shrunk"])
def test_images_decoded_together_are_as_alone(kind: str, pictures: list[Path], tmp_path: Path) -> None:
    """Shuffled, so that formats, modes, orientations and what is left to PIL stand side by side."""
    spec, draw = spec_of(kind), Draw(side=0.7, left=0.3, top=0.8, flip=False, brightness=1.2)
    paths = [path for path in pictures if not narrow(path)]
    random.Random(1).shuffle(paths)
    requests = [ImageRequest(path, 1, None, draw if number % 5 == 0 else None) for number, path in enumerate(paths)]
    left: list[str] = []
    together = list(load_frames(requests, spec, BY_DALI, left))
    left_alone: list[str] = []
    for request, (frames, grid) in zip(requests, together, strict=True):
        ((frames_alone, grid_alone),) = load_frames([request], spec, BY_DALI, left_alone)
        assert grid == grid_alone and len(frames) == len(frames_alone)
        assert all(np.array_equal(*pair) for pair in zip(frames, frames_alone, strict=True)), request.path
    assert left == left_alone and len(left) > 20


def test_a_broken_image_among_others_is_named_with_its_row(tmp_path: Path) -> None:
    good = [ImageRequest(PHOTO_DIR / name, row=name) for name in PHOTOS]
    for path in write_broken(tmp_path):
        with pytest.raises(UseError) as alone:
            load_patches(path, spec_of("resized"))
        requests = [*good, ImageRequest(path, row="rows.jsonl:7"), *good]
        with pytest.raises(UseError) as found:
            list(load_frames(requests, spec_of("resized"), BY_DALI))
        assert str(found.value) == f"rows.jsonl:7: {alone.value}"


def test_large_images_are_not_held_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    decode = dali.decode_together
    monkeypatch.setattr(dali, "decode_together", lambda files, on: (sizes.append(len(files)), decode(files, on))[1])
    requests = [ImageRequest(PHOTO_DIR / name) for name in PHOTOS * 10]
    assert len(list(load_frames(requests, spec_of("resized"), BY_DALI))) == 20
    assert sizes == [8, 8, 4]
    sizes.clear()
    monkeypatch.setattr(images_by_dali, "MOST_PIXELS", 1)
    assert len(list(load_frames(requests[:3], spec_of("resized"), BY_DALI))) == 3
    assert sizes == [1, 1, 1]


def narrow(path: Path) -> bool:
    """Sides that `dynamic` families refuse."""
    width, height = read_image_size(path)
    return max(width, height) > 200 * min(width, height)


def test_what_dali_cannot_decode_though_pil_can_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(encoded(photo(0, 90, 70), "JPEG"))
    monkeypatch.setattr(dali, "decode_together", lambda files, _device: [None] * len(files))
    left: list[str] = []
    ours = load_patches(path, spec_of("resized"), 1, BY_DALI, left_to_pil=left)
    assert left == ["JPEG that DALI cannot decode"] and torch.equal(ours, load_patches(path, spec_of("resized")))


def test_augmented_images_are_nearly_as_by_pil() -> None:
    draw = Draw(side=0.7, left=0.3, top=0.8, flip=True, brightness=1.2, contrast=0.8, saturation=0.9)
    path = PHOTO_DIR / PHOTOS[0]
    ours, reference = (load_patches(path, spec_of("resized"), 1, one, draw=draw) for one in (BY_DALI, ImageLoading()))
    assert levels_apart(ours, reference).mean() < MOST_MEAN
    assert levels_apart(ours, load_patches(path, spec_of("resized"))).mean() > 10


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_arguments_fit_the_installed_package(device: Any) -> None:
    """All that can be said of the GPU where there is none: the calls are spelled as the package wants them."""
    import nvidia.dali.experimental.dynamic as dynamic

    inspect.signature(dynamic.decoders.image).bind(None, **dali.decode_arguments(device))
    inspect.signature(dynamic.resize).bind(None, **dali.resize_arguments((3, 4), 3))
    inspect.signature(dynamic.slice).bind(None, **dali.pad_arguments([-1, 0], 5, (1, 2, 3)))
    inspect.signature(dynamic.EvalContext).bind(num_threads=1, device_id=0)
    assert callable(dynamic.Tensor.gpu) and callable(dynamic.Tensor.cpu)
    with pytest.raises(TypeError):
        inspect.signature(dynamic.resize).bind(None, sizes=(3, 4))


def capability(name: str, available: bool) -> Capability:
    return Capability(name, available, "1", "why not", f"pip install {name}", "something")


@pytest.mark.parametrize(
    ("asked", "cuda", "there", "expected"),
    [
        ("auto", False, True, "pil"),
        ("auto", True, False, "pil"),
        ("auto", True, True, "dali"),
        ("pil", True, True, "pil"),
        ("dali", False, True, "dali"),
    ],
)
def test_choice(asked: Any, cuda: bool, there: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"cuda": capability("cuda", cuda), "nvidia-dali": capability("nvidia-dali", there)}
    monkeypatch.setattr(image_loading, "probe", found.__getitem__)
    assert choose_backend(asked, "cpu") == expected


def test_asking_for_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from megavlm.platform import capabilities

    monkeypatch.setitem(capabilities.PROBES, "cuda", lambda: capability("cuda", False))
    with pytest.raises(UseError, match=r"cuda: got why not; expected it installed .*; fix: pip install cuda"):
        choose_backend("dali", "gpu")
    monkeypatch.setitem(capabilities.PROBES, "nvidia-dali", lambda: capability("nvidia-dali", False))
    with pytest.raises(UseError, match=r"nvidia-dali: got why not; .*fix: pip install nvidia-dali") as caught:
        choose_backend("dali", "cpu")
    assert "\n" not in str(caught.value)


def test_a_filter_that_dali_lacks() -> None:
    check_resample(BY_DALI, 3)
    check_resample(ImageLoading(), 5)
    with pytest.raises(UseError, match=r"resample: got 5 with data\.image_backend=dali"):
        check_resample(BY_DALI, 5)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_says_once_what_is_left_to_pil(
    num_workers: int, tmp_path: Path, qwen_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        (tmp_path / f"{number}.gif").write_bytes(encoded(photo(number, 90, 70), "GIF"))
        (tmp_path / f"{number}.jpg").write_bytes(encoded(photo(number, 90, 70), "JPEG"))
    turns = [{"role": "user", "content": "<image><image>what?"}, {"role": "assistant", "content": "a house"}]
    rows = [{"messages": turns, "images": [f"{number}.gif", f"{number}.jpg"]} for number in range(3)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    inputs: InputSpec = QWEN_INPUTS
    spec, tokenizer = read_image_spec(qwen_dir, inputs), Tokenizer(qwen_dir, inputs.image_token_id)
    encoder = SampleEncoder(inputs, spec, tokenizer, 200, loading=BY_DALI)
    dataset = Dataset(Rows.open([str(path)]), encoder)
    dataset.prepare()
    orders = [MicrobatchOrder((index,), ((index, 0), (index, 1))) for index in range(3)]
    loader = BatchLoader(dataset, lambda _step: orders, 4, 8, num_workers)
    with caplog.at_level(logging.WARNING, "megavlm.data.loader"):
        microbatches = list(loader.batches(0))
    loader.close()
    assert [one.left_to_pil for one in microbatches] == [("GIF P",)] * 3
    assert loader.left_to_pil == {"GIF P": 3}
    assert caplog.text.count("images of the kind GIF P are decoded by PIL") == 1
