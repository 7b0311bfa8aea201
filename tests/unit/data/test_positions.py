import numpy as np
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from megavlm.data.positions import linear_positions, mrope_positions

IMAGE = 5


@pytest.fixture(scope="module")
def hf_model(qwen_dir):
    return Qwen3VLForConditionalGeneration.from_pretrained(qwen_dir).model


def conversation(layout):
    """Tokens for a list of text lengths (numbers) and image grids (tuples); an end marker follows each image."""
    tokens, grids = [], []
    for piece in layout:
        if isinstance(piece, tuple):
            grids.append((1, *piece))
            tokens += [IMAGE] * (piece[0] * piece[1] // 4)
        else:
            tokens += [7] * piece
    return np.array(tokens), grids


@pytest.mark.parametrize(
    "layout",
    [
        [1],
        [9],
        [3, (4, 6), 5],
        [(2, 2), 1],
        [4, (8, 2), 2, (2, 10), 1, (6, 6)],
        [2, (2, 2), 1, (2, 2), 1, (2, 2), 7],
        [1, (32, 4), 1],
    ],
)
def test_mrope_equals_transformers(hf_model, layout):
    tokens, grids = conversation(layout)
    ids = torch.from_numpy(tokens)[None]
    expected, _ = hf_model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == IMAGE).int(),
        image_grid_thw=torch.tensor(grids) if grids else None,
        attention_mask=torch.ones_like(ids),
    )
    actual = mrope_positions(tokens, IMAGE, grids, 2)
    assert actual.dtype == np.int64
    assert np.array_equal(actual, expected[:, 0].numpy())


def test_text_behind_an_image_goes_on_from_its_longer_side():
    tokens, grids = conversation([2, (4, 8), 2])
    assert mrope_positions(tokens, IMAGE, grids, 2).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 6, 7],
        [0, 1, 2, 2, 2, 2, 3, 3, 3, 3, 6, 7],
        [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7],
    ]


def test_grids_unlike_the_tokens_are_caught():
    tokens, grids = conversation([2, (4, 8), 2])
    for wrong in ([(1, 4, 6)], [(1, 4, 10)], []):
        with pytest.raises((AssertionError, IndexError)):
            mrope_positions(tokens, IMAGE, wrong, 2)


def test_linear_positions():
    assert linear_positions(3).tolist() == [[0, 1, 2]] * 3
