import itertools
import math

import pytest
import torch

from megavlm.checkpoint.optimizer_shards import flat_boxes

pytestmark = pytest.mark.next_core


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (1, 5), (5, 1), (2, 3, 4), (1, 3, 2, 2)])
def test_boxes_are_the_elements_in_their_order(shape):
    whole = torch.arange(math.prod(shape)).view(shape)
    for start, end in itertools.combinations_with_replacement(range(whole.numel() + 1), 2):
        found = []
        for offset, size in flat_boxes(shape, start, end):
            box = whole[tuple(slice(at, at + count) for at, count in zip(offset, size, strict=True))]
            assert box.shape == size and box.is_contiguous()
            found += box.flatten().tolist()
        assert found == list(range(start, end))


def test_a_matrix_needs_three_boxes_at_most():
    assert list(flat_boxes((4, 10), 7, 33)) == [((0, 7), (1, 3)), ((1, 0), (2, 10)), ((3, 0), (1, 3))]
    assert list(flat_boxes((4, 10), 12, 15)) == [((1, 2), (1, 3))]
    assert list(flat_boxes((4, 10), 10, 30)) == [((1, 0), (2, 10))]
    assert list(flat_boxes((4, 10), 5, 5)) == []
