import base64
import io
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megavlm.checkpoint.hf_io import read_architecture
from megavlm.data.encode import open_encoder
from megavlm.data.image_views import cut_frames, image_views
from megavlm.data.images import load_patches, target_grid
from megavlm.data.inspect.preview import ShownRow, pixels_of, show_row, show_tokens
from megavlm.data.inspect.rows import open_rows
from megavlm.observe.data_pages import preview_page
from tests.tiny_anyres import write_tiny_llava_next
from tests.tiny_internvl import write_tiny_internvl
from tests.unit.data.conftest import LLAVA_INPUTS, QWEN_INPUTS, draw_image
from tests.unit.data.inspect.conftest import chat

Write = Callable[[list[Any]], str]


def decoded(uri: str) -> np.ndarray:
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_pixels_are_the_resized_image(qwen_dir: Path, tmp_path: Path) -> None:
    path = draw_image(tmp_path / "a.png", 75, 130)
    spec = open_encoder(qwen_dir, QWEN_INPUTS, 1000).image_spec
    grid = target_grid(spec, 75, 130)
    (pixels,) = pixels_of(load_patches(path, spec), grid, spec)
    size = (grid[2] * spec.patch_px, grid[1] * spec.patch_px)
    expected = np.asarray(Image.open(path).convert("RGB").resize(size, resample=spec.resample))
    assert pixels.shape == expected.shape and (pixels == expected).all()


def test_pixels_are_the_cropped_image(llava_dir: Path, tmp_path: Path) -> None:
    path = draw_image(tmp_path / "a.png", 56, 28)
    spec = open_encoder(llava_dir, LLAVA_INPUTS, 1000).image_spec
    (pixels,) = pixels_of(load_patches(path, spec), target_grid(spec, 56, 28), spec)
    assert (pixels == np.asarray(Image.open(path).convert("RGB"))[:, 14:42]).all()


def shown(hf_dir: Path, path: str, row: int = 0, max_length: int = 10**6) -> ShownRow:
    encoder = open_encoder(hf_dir, read_architecture(hf_dir).inputs, 10**6)
    return show_row(open_rows([path]), row, encoder, max_length)


@pytest.fixture(scope="module")
def internvl_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_internvl(tmp_path_factory.mktemp("models") / "internvl")


def test_tiles_are_the_tiles(folder: Write, internvl_dir: Path, tmp_path: Path) -> None:
    encoder = open_encoder(internvl_dir, read_architecture(internvl_dir).inputs, 10**6)
    spec = encoder.image_spec
    row = show_row(open_rows([folder([chat("What?", "two", "0.png")])]), 0, encoder, 10**6)
    (image,) = row.images
    picture = Image.open(tmp_path / "0.png").convert("RGB")
    _, rows, columns = target_grid(spec, *picture.size, 1)[:3]
    views = image_views(spec, *picture.size, rows, columns, 1)
    tiles = [
        frame for view in views for frame in cut_frames(view, np.asarray(picture.resize(view.size, spec.resample)))
    ]
    assert len(tiles) > 2 and image.columns == 2, "an image twice as wide as high"
    for frame, tile in zip((*image.tiles, *image.whole), tiles, strict=True):
        assert (decoded(frame.uri) == tile).all()


def test_anyres_shows_the_whole_first(folder: Write, tmp_path: Path) -> None:
    hf_dir = write_tiny_llava_next(tmp_path / "next")
    row = shown(hf_dir, folder([chat("What?", "two", "0.png")]))
    (image,) = row.images
    encoder = open_encoder(hf_dir, read_architecture(hf_dir).inputs, 10**6)
    spec = encoder.image_spec
    whole = Image.open(tmp_path / "0.png").convert("RGB").resize((spec.image_px, spec.image_px), resample=spec.resample)
    assert (decoded(image.whole[0].uri) == np.asarray(whole)).all()
    assert len(image.tiles) == target_grid(spec, 112, 56)[0] - 1 and len(image.tiles) % image.columns == 0


def test_tokens_with_weights_and_positions(folder: Write, qwen_dir: Path) -> None:
    samples = open_rows([folder([chat("What?\nWell?", "two", "0.png", "1.png")])])
    encoder = open_encoder(qwen_dir, QWEN_INPUTS, 10**6)
    encoded = encoder.encode(samples[0])
    tokens = show_tokens(encoded, encoder)
    assert sum(token.count for token in tokens) == len(encoded.tokens_S)
    visual = [token for token in tokens if token.kind == "visual"]
    assert [token.count for token in visual] == [QWEN_INPUTS.num_image_tokens(grid) for grid in encoded.grids_thw]
    assert [token.text for token in tokens if token.kind == "special"][:2] == ["<|im_start|>", "<|vision_start|>"]
    learned = "".join(token.text for token in tokens if token.weight > 0)
    assert learned == "two<|im_end|>"
    assert sum(token.weight * token.count for token in tokens) == encoded.loss_weights_S().sum()
    assert any(token.breaks and "\u23ce" in token.text for token in tokens)
    start = next(index for index, token_id in enumerate(encoded.tokens_S) if token_id == QWEN_INPUTS.image_token_id)
    time, rows, columns = encoded.position_ids_3S[:, start : start + visual[0].count]
    expected = f"position time {time[0]}, row {rows.min()} to {rows.max()}, column {columns.min()} to {columns.max()}"
    assert visual[0].where.endswith(expected) and f"tokens {start} to" in visual[0].where


def test_images_side_by_side_are_runs_of_their_own(folder: Write, llava_dir: Path) -> None:
    encoder = open_encoder(llava_dir, LLAVA_INPUTS, 10**6)
    samples = open_rows([folder([chat("What?", "two", "0.png", "1.png")])])
    visual = [token for token in show_tokens(encoder.encode(samples[0]), encoder) if token.kind == "visual"]
    assert [token.count for token in visual] == [16, 16]


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_holds_all_and_needs_nothing(folder: Write, qwen_dir: Path) -> None:
    rows = [chat("<b>What?</b>", "two", "0.png", "1.png"), chat("Who?", " "), chat("Where?", "here")]
    path = folder(rows)
    shown_rows = [shown(qwen_dir, path, row, 20) for row in range(3)]
    page = _Page(preview_page("rows & more", shown_rows))
    images = [attrs for tag, attrs in page.elements if tag == "img"]
    assert len(images) == 2 and all((attrs["src"] or "").startswith("data:image/png") for attrs in images)
    assert not [attrs for _, attrs in page.elements if "href" in attrs or (attrs.get("src") or "data:")[:5] != "data:"]
    assert "b" not in [tag for tag, _ in page.elements], "texts of rows are escaped"
    assert "rows & more" in page.text and "the empty answer" in page.text and "training leaves it out" in page.text
    spans = [attrs for tag, attrs in page.elements if tag == "span" and "title" in attrs]
    assert len(spans) == sum(len(row.tokens) for row in shown_rows)
