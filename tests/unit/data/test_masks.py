"""Masks of rows: what is read of them, what they cover of an image's tokens, and what packing and the index make of it.

References: areas counted on a fine raster (PIL), pixels as COCO's own library decodes them, and the pixels that a
family's image processor would show to each token.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco

from megavlm.config.tasks import SEGMENT_TOKEN
from megavlm.data.augment import Augmentation, draw_for
from megavlm.data.dataset import Dataset
from megavlm.data.encode import open_encoder
from megavlm.data.extend_tokens import add_tokens
from megavlm.data.image_views import cut_frames, image_views
from megavlm.data.images import target_grid
from megavlm.data.index_files import build_index
from megavlm.data.masks import TokenGrid, mask_shares, open_mask_encoder, polygon_shares, token_grid
from megavlm.data.packing import pack
from megavlm.data.row_options import RowOptions
from megavlm.data.rows import Rows
from megavlm.data.sample import Mask
from megavlm.errors import UseError
from tests.tiny import write_tiny_llava, write_tiny_qwen3vl
from tests.unit.data.conftest import LLAVA_INPUTS, QWEN_INPUTS, draw_image, write_jsonl

RASTER = 64  # points a unit of length


def raster_shares(points_P2, rows, columns):
    """Points in the middle of fine squares that lie in a polygon, by PIL; its own outline is half a square too wide."""
    image = Image.new("L", (columns * RASTER, rows * RASTER))
    ImageDraw.Draw(image).polygon([(x * RASTER - 0.5, y * RASTER - 0.5) for x, y in points_P2], fill=1)
    return np.asarray(image, float).reshape(rows, RASTER, columns, RASTER).mean((1, 3))


POLYGONS = {
    "triangle": [(0.3, 0.2), (4.7, 1.1), (1.4, 3.8)],
    "the other way round": [(1.4, 3.8), (4.7, 1.1), (0.3, 0.2)],
    "within one square": [(2.1, 1.2), (2.8, 1.3), (2.5, 1.9)],
    "all": [(0, 0), (5, 0), (5, 4), (0, 4)],
    "beyond all sides": [(-2, -1), (7, -3), (9, 6), (-1, 8)],
    "beyond some sides": [(-2.5, 1.3), (2.2, -1.7), (7.1, 2.6), (3.3, 6.2)],
    "a comb": [(0.5, 3.5), (0.5, 0.5), (1.5, 0.5), (1.5, 2.5), (2.5, 2.5), (2.5, 0.5), (4.5, 0.5), (4.5, 3.5)],
    "a hole": [(0.5, 0.5), (4.5, 0.5), (4.5, 3.5), (0.5, 3.5), (0.5, 0.5), (1.5, 1.5), (1.5, 2.5), (3, 2.5), (3, 1.5),
               (1.5, 1.5)],
}  # fmt: skip


@pytest.mark.parametrize("name", POLYGONS)
def test_areas_of_polygons(name):
    points_P2 = np.array(POLYGONS[name], float)
    found = polygon_shares(points_P2, 4, 5)
    # PIL draws outlines half a fine square too wide: at most four of them go through a unit square
    assert np.abs(found - raster_shares(points_P2, 4, 5)).max() < 2 / RASTER
    following = np.roll(points_P2, -1, axis=0)
    inside = (points_P2 >= 0).all() and (points_P2 <= (5, 4)).all()
    if inside:
        area = abs((points_P2[:, 0] * following[:, 1] - points_P2[:, 1] * following[:, 0]).sum()) / 2
        assert found.sum() == pytest.approx(area, abs=1e-9)


def test_areas_by_hand():
    # A diamond around the corner of four squares has half of each; a square of side 1 that is moved lies on four.
    half = polygon_shares(np.array([(1, 0), (2, 1), (1, 2), (0, 1)], float), 2, 2)
    np.testing.assert_allclose(half, np.full((2, 2), 0.5), atol=1e-12)
    moved = polygon_shares(np.array([(0.25, 0.5), (1.25, 0.5), (1.25, 1.5), (0.25, 1.5)]), 2, 2)
    np.testing.assert_allclose(moved, [[0.375, 0.125], [0.375, 0.125]], atol=1e-12)


def blob(height, width, seed=0):
    """A mask of two discs, one of which reaches beyond the image."""
    image = Image.new("1", (width, height))
    for x, y, radius in ((width * 0.3, height * 0.4, 0.3 * height), (width, height * 0.8, 0.2 * height + seed)):
        ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
    return np.asarray(image)


def runs(pixels_HW):
    """As COCO writes them without packing."""
    flat, counts, value = pixels_HW.T.ravel(), [], False
    while len(flat):
        ends = np.flatnonzero(flat != value)
        counts.append(int(ends[0]) if len(ends) else len(flat))
        flat, value = flat[counts[-1] :], not value
    return counts


def read(folder, masks, answer=f"It is {SEGMENT_TOKEN}.", images=("a.png",), question="<image>What?"):
    row = {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "images": list(images),
        "masks": masks,
    }
    return Rows.open([str(write_jsonl(folder / "rows.jsonl", [row]))], RowOptions())[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("masks")
    draw_image(folder / "a.png", 96, 64)
    draw_image(folder / "b.png", 50, 120, seed=1)
    return folder


def test_runs_are_those_of_coco(folder):
    grid = TokenGrid(4, 6, (1 / 16, 1 / 16), (0.0, 0.0))
    for seed in range(4):
        pixels_HW = blob(64, 96, seed)
        packed = coco.encode(np.asfortranarray(pixels_HW.astype(np.uint8)))
        assert (coco.decode(packed) == pixels_HW).all()
        expected = pixels_HW.reshape(4, 16, 6, 16).mean((1, 3))
        for counts in (runs(pixels_HW), packed["counts"].decode()):
            (mask,) = read(folder, [{"size": [64, 96], "counts": counts}]).masks
            assert mask.run_lengths == tuple(runs(pixels_HW)) and mask.size == (64, 96)
            np.testing.assert_allclose(mask_shares(mask, (96, 64), grid), expected, atol=1e-6)
    assert 0 < expected.mean() < 1


def test_polygons_are_nearly_the_pixels_of_coco(folder):
    polygons = [[10.0, 8, 60, 12.5, 40, 50, 12, 44], [70, 30, 95, 30, 95, 60]]
    (mask,) = read(folder, [polygons]).masks
    grid = TokenGrid(4, 6, (1 / 16, 1 / 16), (0.0, 0.0))
    pixels_HW = coco.decode(coco.merge(coco.frPyObjects(polygons, 64, 96)))
    found = mask_shares(mask, (96, 64), grid)
    # COCO's own pixels are off by up to half a pixel along an edge: 8 or so of a token's 256
    assert np.abs(found - pixels_HW.reshape(4, 16, 6, 16).mean((1, 3))).max() < 10 / 256
    assert np.abs(found.sum() * 256 - pixels_HW.sum()) < 40


@pytest.mark.parametrize("size", [(96, 64), (33, 70), (200, 50)])
@pytest.mark.parametrize("family", ["qwen", "llava"])
def test_what_a_token_sees_of_an_image(family, size, qwen_dir, llava_dir):
    """An image that is the mask in black and white, through resizing, cropping and patches, has the shares as means."""
    inputs, hf_dir = (QWEN_INPUTS, qwen_dir) if family == "qwen" else (LLAVA_INPUTS, llava_dir)
    encoder = open_encoder(hf_dir, inputs, 4096)
    width, height = size
    pixels_HW = blob(height, width)
    image = Image.fromarray(pixels_HW.astype(np.uint8) * 255).convert("RGB")
    grid = target_grid(encoder.image_spec, width, height, 1)
    (view,) = image_views(encoder.image_spec, width, height, grid[1], grid[2])
    # Each pixel counts by its area, as shares do: the family's bicubic filter would blur, and PIL's box filter takes
    # pixels whole or not at all, so they are made small first.
    large = image.resize((16 * width, 16 * height), Image.Resampling.NEAREST)
    resized = np.asarray(large.resize(view.size, Image.Resampling.BOX))
    (frame,) = cut_frames(view, resized)
    side = encoder.image_spec.patch_px * inputs.merge_size
    rows, columns = frame.shape[0] // side, frame.shape[1] // side
    seen = frame[..., 0].reshape(rows, side, columns, side).mean((1, 3)) / 255
    tokens = token_grid(encoder.image_spec, inputs, size, grid)
    assert (tokens.rows, tokens.columns) == (rows, columns) and rows * columns == inputs.num_image_tokens(grid)
    found = mask_shares(Mask(size=(height, width), run_lengths=tuple(runs(pixels_HW))), size, tokens)
    assert np.abs(found - seen).max() < 0.01
    # and a polygon of a rectangle is the same as its pixels
    box = (width // 5, height // 4, width - width // 6, height - 3)
    inside = np.zeros((height, width), bool)
    inside[box[1] : box[3], box[0] : box[2]] = True
    polygon = Mask(polygons=((box[0], box[1], box[2], box[1], box[2], box[3], box[0], box[3]),))
    by_pixels = Mask(size=(height, width), run_lengths=tuple(runs(inside)))
    np.testing.assert_allclose(mask_shares(polygon, size, tokens), mask_shares(by_pixels, size, tokens), atol=1e-6)


@pytest.fixture(scope="module", params=["qwen", "llava"])
def encoder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write, inputs = {"qwen": (write_tiny_qwen3vl, QWEN_INPUTS), "llava": (write_tiny_llava, LLAVA_INPUTS)}[
        request.param
    ]
    hf_dir = write(folder / "hf")
    add_tokens(hf_dir, hf_dir, [SEGMENT_TOKEN])
    return open_encoder(hf_dir, inputs, 4096, with_masks=True)


FIRST = [[8, 8, 80, 8, 80, 56, 8, 56]]
SECOND = {"segmentation": [[0, 0, 50, 0, 50, 60, 0, 60]], "image_id": 1}


def test_masks_are_packed_with_their_tokens(encoder, folder):
    two = f"{SEGMENT_TOKEN} and {SEGMENT_TOKEN}"
    samples = [
        read(folder, [SECOND, FIRST], two, ("a.png", "b.png"), "<image> or <image>?"),
        read(folder, None, "nothing"),
        read(folder, [FIRST]),
    ]
    encoded = [encoder.encode(sample) for sample in samples]
    assert [len(one.masks) for one in encoded] == [2, 0, 1]
    batch = pack(
        encoded, None, sample_multiple=4, total_multiple=8, pad_token_id=0, patch_channels=encoder.inputs.patch_channels
    )
    image_id, seg_id = encoder.inputs.image_token_id, encoder.masks.token_id
    counts = [encoder.inputs.num_image_tokens(grid) for grid in encoded[0].grids_thw]
    visual = np.flatnonzero(batch.tokens_T.numpy() == image_id)
    places = batch.mask_places_M3.tolist()
    assert [place[0] for place in places] == np.flatnonzero(batch.tokens_T.numpy() == seg_id).tolist()
    assert [place[1] for place in places] == [visual[counts[0]], visual[0], visual[sum(counts) + counts[0]]]
    assert [place[2] for place in places] == [counts[1], counts[0], counts[0]]
    shares = np.split(batch.mask_shares_X.numpy(), np.cumsum([place[2] for place in places]))
    assert (shares[1] == shares[2]).all() and len(shares[3]) == 0
    if encoder.inputs.image_kind == "dynamic":
        assert shares[0].mean() == pytest.approx(0.5, abs=1e-3)
        assert shares[1].mean() == pytest.approx(72 * 48 / (96 * 64), abs=1e-6)


def test_an_index_gives_the_same_masks(encoder, folder, tmp_path):
    texts = (f"{SEGMENT_TOKEN}", f"{SEGMENT_TOKEN} {SEGMENT_TOKEN}", "none")
    rows = [
        {
            "messages": [{"role": "user", "content": "<image>x"}, {"role": "assistant", "content": text}],
            "images": [str(folder / "b.png")],
            "masks": [[[0, 0, 30, 5 * number, 20, 100]]] * text.count(SEGMENT_TOKEN),
        }
        for number, text in enumerate(texts)
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    samples = Rows.open([str(path)], RowOptions())
    dataset = Dataset(samples, encoder)
    dataset.adopt(build_index(tmp_path / "index", samples, encoder, stop_at_mistake=True))
    for number, sample in enumerate(samples):
        fresh, kept = encoder.encode(sample), dataset.encoded(number)
        assert len(fresh.masks) == len(kept.masks) == texts[number].count(SEGMENT_TOKEN)
        for one, other in zip(fresh.masks, kept.masks, strict=True):
            assert (one.position, one.start, one.size) == (other.position, other.start, other.size)
            assert one.shares_V.tobytes() == other.shares_V.tobytes()
    rows[1]["masks"] = []
    changed = [dataclasses.replace(sample, masks=()) for sample in samples]
    dataset.samples, dataset._cache = changed, {}
    with pytest.raises(UseError, match="0 masks; expected 1, as the index says"):
        dataset.encoded(0)


def test_a_row_that_is_cut_keeps_its_first_masks(encoder, folder):
    turns = []
    for _ in range(3):
        turns += [{"role": "user", "content": "x"}, {"role": "assistant", "content": f"a {SEGMENT_TOKEN} b c d e"}]
    turns[0]["content"] = "<image>x"
    row = {"messages": turns, "images": ["a.png"], "masks": [FIRST, [[0, 0, 9, 0, 9, 9]], FIRST]}
    sample = Rows.open([str(write_jsonl(folder / "long.jsonl", [row]))], RowOptions())[0]
    whole = encoder.encode(sample)
    for rule in ("cut_turns", "cut_answer"):
        for length in range(len(whole.tokens_S) - 1, len(whole.tokens_S) * 2 // 3, -2):
            encoder.too_long, encoder.max_length = rule, length
            cut = encoder.encode(sample)
            assert len(cut.tokens_S) <= length
            positions = np.flatnonzero(cut.tokens_S == encoder.masks.token_id).tolist()
            assert [mask.position for mask in cut.masks] == positions and len(positions) < 4
    encoder.too_long, encoder.max_length = "drop", 4096


SIZE = [64, 96]


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        ({}, "`masks` of type dict"),
        ([], "0 `masks` and 1 <seg> in answers"),
        ([FIRST, FIRST], "2 `masks` and 1 <seg> in answers"),
        (["x"], r"masks\[0\]: got x; expected polygons"),
        ([[]], r"masks\[0\]: got \[\]"),
        ([[[1, 2, 3, 4]]], r"masks\[0\]: got \[\[1, 2, 3, 4\]\]; expected polygons"),
        ([[[1, 2, 3, 4, 5, 6, 7]]], "expected polygons"),
        ([[[1, 2, 3, 4, 5, True]]], "expected polygons"),
        ([[[1, 2, 3, 4, 5, float("nan")]]], "expected polygons"),
        ([{"segmentation": FIRST, "image_id": 1}], "image_id 1 with 1 images"),
        ([{"segmentation": FIRST, "image_id": "0"}], "image_id 0 with 1 images"),
        ([{"counts": [6144]}], "size None"),
        ([{"size": [64, 0], "counts": [0]}], r"size \[64, 0\]"),
        ([{"size": SIZE, "counts": [6143]}], r"counts \[6143\]; expected lengths of runs that add up to 64 x 96"),
        ([{"size": SIZE, "counts": [6145, -1]}], "add up to"),
        ([{"size": SIZE, "counts": "~~~"}], "counts 3 characters"),
        ([{"size": SIZE, "counts": "o"}], "counts 1 characters"),
        ([{"size": SIZE, "counts": ""}], "counts 0 characters"),
    ],
)
def test_mistakes_of_rows_are_one_line(folder, masks, expected):
    with pytest.raises(UseError, match=expected) as caught:
        read(folder, masks)
    assert "rows.jsonl row 1: " in str(caught.value) and "\n" not in str(caught.value)


def test_mistakes_that_only_the_image_or_the_text_shows(encoder, folder):
    cases = [
        (read(folder, [[[0, 0, 98, 0, 98, 20]]]), "points within the image of 96x64 pixels"),
        (read(folder, [{"size": [96, 64], "counts": [6144]}]), r"size \[96, 64\]; expected \[64, 96\]"),
        (read(folder, [FIRST], question=f"<image>{SEGMENT_TOKEN}?"), "2 tokens <seg> and 1 `masks`"),
        (read(folder, None), "1 tokens <seg> and 0 `masks`"),
    ]
    for sample, expected in cases:
        with pytest.raises(UseError, match=expected) as caught:
            encoder.encode(sample)
        assert str(caught.value).startswith(sample.sample_id) and "\n" not in str(caught.value)
    numbered = read(folder, None, question="<image:1> what?")
    with pytest.raises(UseError, match="`masks` beside <image:1>"):
        read(folder, [FIRST], question="<image:1> what?")
    assert numbered.masks == ()


def test_what_cannot_have_masks(qwen_dir):
    with pytest.raises(UseError, match="no token <seg>.*megavlm add-tokens '<seg>'"):
        open_encoder(qwen_dir, QWEN_INPUTS, 512, with_masks=True)
    spec = open_encoder(qwen_dir, QWEN_INPUTS, 512).image_spec
    for change in ({"image_kind": "tiles"}, {"image_kind": "anyres"}, {"num_queries": 8}):
        with pytest.raises(UseError, match="expected visual tokens that are a plain grid") as caught:
            open_mask_encoder(qwen_dir, dataclasses.replace(QWEN_INPUTS, **change), spec)
        assert "\n" not in str(caught.value)


def test_a_row_with_masks_is_neither_cropped_nor_mirrored(folder):
    everything = Augmentation(crop_min_area=0.3, flip_probability=1.0)
    with_mask, without = read(folder, [FIRST]), read(folder, [], answer="It is.")
    assert draw_for(everything, with_mask, 0, 0, 0).side == 1 and not draw_for(everything, with_mask, 0, 0, 0).flip
    assert draw_for(everything, without, 0, 0, 0).side < 1 and draw_for(everything, without, 0, 0, 0).flip


def test_masks_do_not_change_other_encoders(folder, qwen_dir):
    """Rows may have masks that nobody learns: then the token is text like any other."""
    plain = open_encoder(qwen_dir, QWEN_INPUTS, 4096)
    assert plain.encode(read(folder, [FIRST])).masks == ()
