from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megavlm.data.encode import open_encoder
from megavlm.data.inspect.rows import open_rows
from megavlm.data.inspect.stats import Histogram, gather, histogram, padding_of
from tests.unit.data.conftest import QWEN_INPUTS
from tests.unit.data.inspect.conftest import chat

Write = Callable[[list[Any]], str]


def named(histograms: tuple[Histogram, ...], name: str) -> Histogram:
    return next(one for one in histograms if one.name == name)


def test_rows_are_counted(folder: Write) -> None:
    rows = [
        chat("What?", "two", "0.png", "1.png", task="a"),
        chat("Who?", "me", task="b"),
        chat("Why?", "so", task="b"),
    ]
    rows.append({"messages": []})
    stats = gather(open_rows([folder(rows)]))
    assert stats.num_rows == 4 and len(stats.problems) == 1 and "row 4" in stats.problems[0]
    assert stats.totals == {"turns": 6, "characters": 5 + 3 + 4 + 2 + 4 + 2, "images": 2, "videos": 0}
    assert named(stats.histograms, "images").bars == (("0", 2), ("1", 0), ("2", 1))
    assert named(stats.histograms, "answers").bars == (("2", 2), ("3", 1))
    assert named(stats.histograms, "channels").bars == (("b", 2), ("a", 1))
    pixels = named(stats.histograms, "pixels")
    assert sum(count for _, count in pixels.bars) == 2 and pixels.figures["median"] == 112 * 56
    assert not stats.padding and "tokens" not in [one.name for one in stats.histograms]


def test_tokens_are_those_of_the_encoder(folder: Write, qwen_dir: Path) -> None:
    samples = open_rows([folder([chat("What?", "two", "0.png"), chat("Who?", "me", "1.png", "2.png"), chat("Why?")])])
    encoder = open_encoder(qwen_dir, QWEN_INPUTS, max_length=10**6)
    encoded = [encoder.encode(sample) for sample in samples]
    lengths = [len(one.tokens_S) for one in encoded]
    stats = gather(samples, encoder, max_length=max(lengths) - 1, packing_length=200)
    assert stats.totals["tokens"] == sum(lengths)
    assert stats.totals["learned tokens"] == sum(int((one.loss_weights_S() > 0).sum()) for one in encoded)
    num_patches = sum(int(np.prod(grid)) for one in encoded for grid in one.grids_thw)
    assert stats.totals["visual tokens"] == num_patches // QWEN_INPUTS.merge_size**2
    assert stats.num_too_long == 1
    rest = sum(lengths) - max(lengths)
    alone, packed = stats.padding
    assert alone.share == pytest.approx(1 - rest / (2 * (max(lengths) - 1)))
    assert packed.num_packs == 1 and packed.share == pytest.approx(1 - rest / 200)
    assert gather(samples, encoder, max_length=max(lengths) - 1, packing_length=200, nproc=2) == stats


def test_padding() -> None:
    alone, packed = padding_of(np.array([60, 60, 40, 40]), 80, 100)
    assert (alone.num_packs, alone.share) == (4, pytest.approx(1 - 200 / 320))
    assert (packed.num_packs, packed.share) == (2, pytest.approx(0))
    assert padding_of(np.array([60]), 80, 50) == ()


@pytest.mark.parametrize(
    "values",
    [[1, 1, 2], [0, 5, 5000, 70000], [0.1, 0.5, 3.25], [7], [0.75] * 3, [100, 150, 199], [1, 10**9], [0.001, 50.0]],
)
def test_every_value_is_in_one_bar(values: list[float]) -> None:
    one = histogram("x", "X", "things", values)
    assert one is not None
    assert sum(count for _, count in one.bars) == len(values)
    assert one.bars[0][1] and one.bars[-1][1], "no empty ranges at the ends"
    assert len(one.bars) <= 33
    assert one.figures["least"] == min(values) and one.figures["largest"] == max(values)


def test_nothing_is_no_histogram() -> None:
    assert histogram("x", "X", "things", []) is None
    assert histogram("x", "X", "things", [0, 0]) is None
