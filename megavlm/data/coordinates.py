"""Coordinates that are one token each: their ids, and where whole boxes of them stand in a packed row.

Shape suffixes: T tokens of the packed row, K bins of a coordinate, B boxes.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from megavlm.config.tasks import (
    BIN_FORMAT,
    GRID_FORMAT,
    GRID_MARKERS,
    GRID_SIDE,
    NUM_COORDINATE_BINS,
    cell_token,
    coordinate_token,
)
from megavlm.data.tokens import load_tokenizer
from megavlm.errors import use_error

COORDINATES_A_BOX = 4


@functools.lru_cache(maxsize=4)
def coordinate_token_ids(hf_dir: Path) -> tuple[int, ...]:
    """Ids of a model's coordinate tokens, from 0 to NUM_COORDINATE_BINS - 1.

    Raises:
        UseError: the tokenizer does not have them all.
    """
    vocabulary = load_tokenizer(hf_dir).get_vocab()
    tokens = [coordinate_token(number) for number in range(NUM_COORDINATE_BINS)]
    missing = [token for token in tokens if token not in vocabulary]
    if missing:
        raise use_error(
            "model.hf_dir",
            f"{hf_dir}, whose tokenizer has no token {missing[0]}",
            f"{tokens[0]} to {tokens[-1]}, which data.box_format=bin_tokens_1000 writes",
            f"`megavlm add-tokens --coordinates --hf-dir {hf_dir} --out DIR`, and set model.hf_dir=DIR",
        )
    return tuple(vocabulary[token] for token in tokens)


def check_box_tokens(box_format: str, hf_dir: Path) -> None:
    """Check that the tokens of a notation are the model's: else each would become several, and nobody would notice.

    Raises:
        UseError: the tokenizer does not have them all.
    """
    if box_format == BIN_FORMAT:
        coordinate_token_ids(hf_dir)
    if box_format == GRID_FORMAT:
        _check_grid_tokens(hf_dir)


def _check_grid_tokens(hf_dir: Path) -> None:
    vocabulary = load_tokenizer(hf_dir).get_vocab()
    tokens = [*map(cell_token, range(GRID_SIDE**2)), *GRID_MARKERS]
    missing = [token for token in tokens if token not in vocabulary]
    if missing:
        raise use_error(
            "model.hf_dir",
            f"{hf_dir}, whose tokenizer has no token {missing[0]}",
            f"{tokens[0]} to {cell_token(GRID_SIDE**2 - 1)} and {', '.join(GRID_MARKERS)}, which "
            f"data.box_format={GRID_FORMAT} writes",
            f"`megavlm add-tokens --grid --hf-dir {hf_dir} --out DIR`, and set model.hf_dir=DIR",
        )


@dataclass(frozen=True)
class RowBoxes:
    """Boxes that are learned in a packed row.

    Attributes:
        positions_B4: int64, the tokens that predict left, top, right and bottom.
        corners_B4: fp32, where they are, as shares of the image's sides.
    """

    positions_B4: torch.Tensor
    corners_B4: torch.Tensor


def find_boxes(labels_T: torch.Tensor, loss_weights_T: torch.Tensor, ids_K: torch.Tensor) -> RowBoxes:
    """The boxes of a row: four coordinate tokens on end that are learned, with something else around them.

    Runs of another length are none: points, and what the end of an answer that was cut has left of a box.

    Args:
        labels_T: int64, the token behind each one.
        loss_weights_T: weights of predicting it; 0 at the end of each sample.
        ids_K: int64 ids of the coordinate tokens, in the order of their bins.
    """
    ascending_K, order_K = ids_K.sort()
    place_T = torch.searchsorted(ascending_K, labels_T).clamp(max=len(ids_K) - 1)
    is_learned_T = (ascending_K[place_T] == labels_T) & (loss_weights_T > 0)
    edges_T = F.pad(is_learned_T.to(torch.int8), (1, 1)).diff()
    starts, ends = torch.nonzero(edges_T == 1)[:, 0], torch.nonzero(edges_T == -1)[:, 0]
    starts_B = starts[ends - starts == COORDINATES_A_BOX]
    positions_B4 = starts_B[:, None] + torch.arange(COORDINATES_A_BOX)
    return RowBoxes(positions_B4, order_K[place_T[positions_B4]].float() / (len(ids_K) - 1))
