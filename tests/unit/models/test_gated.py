import pytest
import torch

from megavlm.parallel.context import local_part, zigzag_index


def by_hand(is_visual, num_queries, borders):
    """Token by token: the image that each sees."""
    seen, image, count = [], -1, 0
    for start, end in zip(borders[:-1], borders[1:], strict=True):
        image = -1
        for place in range(start, end):
            if is_visual[place]:
                image = count // num_queries
                count += 1
            seen.append(image)
    return seen


ROWS = {
    "two samples": ([0, 0, 1, 1, 0, 0, 0, 0] + [0, 1, 1, 1, 1, 0, 0, 0], [0, 8, 16]),
    "none in the second": ([1, 1, 0, 0] + [0, 0, 0, 0] + [0, 1, 1, 0], [0, 4, 8, 12]),
    "image first in the second": ([0, 0, 1, 1] + [1, 1, 0, 0], [0, 4, 8]),
    "text only": ([0] * 8, [0, 4, 8]),
}


@pytest.mark.parametrize("context_size", [1, 2])
@pytest.mark.parametrize("name", ROWS)
def test_tokens_see_the_last_image_of_their_sample(name, context_size):
    from megavlm.models.gated import images_in_row

    is_visual, borders = ROWS[name]
    visual_T, borders_tensor = torch.tensor(is_visual, dtype=torch.bool), torch.tensor(borders, dtype=torch.int32)
    expected_T = torch.tensor(by_hand(is_visual, 2, borders))
    order = torch.cat([zigzag_index(borders_tensor, context_size, rank) for rank in range(context_size)])
    for rank in range(context_size):
        found = images_in_row(visual_T, 2, borders_tensor, context_size, rank)
        assert torch.equal(found["seen_L"], local_part(expected_T, borders_tensor, context_size, rank))
        if any(is_visual):
            assert visual_T[order][found["visual_V"]].all() and len(found["visual_V"]) == sum(is_visual)
            assert torch.equal(found["image_V"], expected_T[order][found["visual_V"]])
        else:
            assert found["visual_V"].tolist() == [0] and not (found["seen_L"][:, None] == found["image_V"]).any()
