"""Tokens of coordinates: their ids, boxes found among tokens, and what has none of them."""

from pathlib import Path

import pytest
import torch

from megavlm.config.tasks import NUM_COORDINATE_BINS, coordinate_token
from megavlm.data.coordinates import coordinate_token_ids, find_boxes
from megavlm.data.extend_tokens import add_tokens
from megavlm.data.tokens import load_tokenizer
from megavlm.errors import UseError
from tests.tiny import write_tiny_llava
from tests.tiny_boxes import write_tiny_boxes

# Bins 0 to 4 of five, in no order among the ids.
IDS = torch.tensor([11, 30, 12, 10, 20])


def find(labels, weights=None):
    labels = torch.tensor(labels)
    return find_boxes(labels, torch.ones(len(labels)) if weights is None else torch.tensor(weights), IDS)


def test_four_on_end_are_a_box():
    found = find([5, 11, 30, 12, 10, 7, 20, 20, 11, 11, 99])
    assert found.positions_B4.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert found.corners_B4.tolist() == [[0, 0.25, 0.5, 0.75], [1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("labels", "weights"),
    [
        ([5, 11, 30, 7, 9], None),  # a point
        ([11, 30, 12], None),  # an answer that was cut
        ([11] * 5, None),
        ([11] * 8, None),
        ([11, 30, 12, 10], [1.0, 1.0, 0.0, 1.0]),  # not all are learned
        ([11, 30, 12, 10], [0.0] * 4),
        ([13, 9, 31, 0], None),
    ],
)
def test_what_is_no_box(labels, weights):
    found = find(labels, weights)
    assert found.positions_B4.shape == found.corners_B4.shape == (0, 4)


def test_a_box_ends_with_its_sample():
    """The last token of a sample predicts nothing, and weighs nothing."""
    found = find([11, 30, 12, 10, 0, 20, 20, 20, 20, 0], [1.0] * 4 + [0.0] + [1.0] * 4 + [0.0])
    assert found.positions_B4[:, 0].tolist() == [0, 5]


def test_ids_of_a_directory(tmp_path: Path) -> None:
    ids = coordinate_token_ids(write_tiny_boxes(tmp_path / "model"))
    tokenizer = load_tokenizer(tmp_path / "model")
    assert len(ids) == len(set(ids)) == NUM_COORDINATE_BINS
    text = "".join(map(coordinate_token, (0, 7, 999)))
    assert tokenizer.encode(f"a{text}b", add_special_tokens=False)[1:-1] == [ids[0], ids[7], ids[999]]
    assert tokenizer.decode([ids[0], ids[7], ids[999]], skip_special_tokens=True) == text


def test_a_directory_without_them_is_refused(tmp_path: Path) -> None:
    hf_dir = write_tiny_llava(tmp_path / "model")
    with pytest.raises(UseError, match=r"no token <\|0\|>.*megavlm add-tokens --coordinates"):
        coordinate_token_ids(hf_dir)


def test_tokens_that_are_there_already_are_refused(tmp_path: Path) -> None:
    hf_dir = write_tiny_llava(tmp_path / "model")
    (tmp_path / "out").mkdir()
    before, after = add_tokens(hf_dir, tmp_path / "out", ["<a>", "<b>", "<a>", "<image>"])
    assert after == before + 2
    with pytest.raises(UseError, match="has these tokens"):
        add_tokens(tmp_path / "out", tmp_path / "out", ["<b>"])
