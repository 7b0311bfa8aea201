import pytest
from hypothesis import given
from hypothesis import strategies as st

from megavlm.pipeline.shares import share_images

COSTS = st.lists(st.integers(1, 100), max_size=12)


def loads(image_costs, rank_loads, owners):
    total = [0] * len(rank_loads[0])
    for costs, language, microbatch in zip(image_costs, rank_loads, owners, strict=True):
        for rank, load in enumerate(language):
            total[rank] += load
        for cost, rank in zip(costs, microbatch, strict=True):
            total[rank] += cost
    return total


@given(st.lists(COSTS, min_size=1, max_size=6), st.integers(1, 4))
def test_no_rank_is_ahead_by_more_than_an_image(image_costs, num_ranks):
    rank_loads = [[10] * num_ranks] * len(image_costs)
    owners = share_images(image_costs, rank_loads)
    assert [len(row) for row in owners] == [len(row) for row in image_costs]
    total = loads(image_costs, rank_loads, owners)
    assert max(total) - min(total) <= max((cost for row in image_costs for cost in row), default=0)


def test_the_rank_with_less_language_model_encodes_more():
    owners = share_images([[1] * 6], [[3, 3, 0]])
    assert owners[0].count(2) == 4
    assert owners[0].count(0) == owners[0].count(1) == 1


def test_a_microbatch_makes_up_for_the_one_before():
    assert share_images([[5], [5]], [[0, 0], [0, 0]]) == [[0], [1]]


def test_no_images():
    assert share_images([[], [1]], [[1, 2], [1, 2]]) == [[], [0]]


def test_loads_of_every_microbatch():
    with pytest.raises(AssertionError):
        share_images([[1]], [])
