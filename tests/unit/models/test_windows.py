"""Windows of Qwen2.5-VL's tower against transformers' own index."""

import pytest
import torch
from transformers.vision_utils import get_vision_window_index

from tests.pool import PoolKeeper


def order_of(grids: list[list[int]], merge_size: int, window: int) -> tuple[list[int], list[int]]:
    """Our order, on a worker."""
    from megavlm.models.families.qwen2_5_vl import window_order

    order_V, lengths = window_order(torch.tensor(grids), merge_size, window)
    return order_V.tolist(), lengths


@pytest.mark.parametrize(
    ("grids", "window"),
    [
        ([[1, 8, 8]], 2),  # no window is cut
        ([[1, 6, 10], [1, 2, 20], [1, 4, 4]], 2),
        ([[1, 14, 26]], 4),
        ([[3, 6, 10], [2, 4, 2]], 2),  # frames have windows of their own
        ([[1, 4, 6]], 8),  # smaller than a window
    ],
)
def test_order_and_lengths_equal_transformers(grids: list[list[int]], window: int, workers: PoolKeeper) -> None:
    (found,) = workers(1).run(order_of, grids=grids, merge_size=2, window=window)
    index, borders = get_vision_window_index(
        torch.tensor(grids), spatial_merge_size=2, window_size=window * 2 * 14, patch_size=14
    )
    borders = torch.unique_consecutive(torch.as_tensor(borders))
    assert found == (index.tolist(), (borders.diff() // 4).tolist())
