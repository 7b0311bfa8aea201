"""The choice of tokens, greedy and drawn, also over a vocabulary that is split."""

import math

import pytest

from tests.pool import PoolKeeper

IMAGE_TOKEN, VOCABULARY = 5, 8


def chosen(tensor: int, num_draws: int = 0) -> list[list[int]]:
    """On every rank: choices after two rows whose likeliest token would be an image's placeholder, and token 6.

    Greedy, or so many draws.
    """
    import torch

    from megavlm.config.schema import ParallelConfig
    from megavlm.data.sample import Batch
    from megavlm.parallel.groups import initialize
    from megavlm.rollout.native import Sampling, _Draw, _next_tokens

    groups = initialize(ParallelConfig(tensor_model_parallel_size=tensor))
    empty = torch.zeros(4, dtype=torch.int64)
    batch = Batch(
        tokens_T=empty,
        labels_T=empty,
        loss_weights_T=torch.zeros(4),
        position_ids_3T=torch.zeros(3, 4, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 2, 4]),
        real_T=torch.ones(4, dtype=torch.bool),
        patches_PC=torch.zeros(0, 3),
        grid_thw_N3=torch.zeros(0, 3, dtype=torch.int64),
        sample_ids=("a", "b"),
        num_real_tokens=4,
    )
    logits = torch.zeros(4, VOCABULARY)
    logits[1, IMAGE_TOKEN], logits[1, 2] = 9.0, 3.0
    logits[3, 6] = 4.0
    part = logits.chunk(tensor, dim=1)[groups.tensor.rank()]
    last = torch.tensor([1, 3])
    draws: list[_Draw | None] = [None]
    if num_draws:
        draws = [_Draw(Sampling(2.0, [(7, n), (8, n)]), (0, 1), n % 3) for n in range(num_draws)]
    return [
        _next_tokens(lambda row, choose: choose(part, row), batch, last, groups, draw, IMAGE_TOKEN) for draw in draws
    ]


@pytest.mark.parametrize("tensor", [1, 2])
def test_an_image_is_never_answered(workers: PoolKeeper, tensor: int) -> None:
    assert workers(tensor).run(chosen, tensor=tensor) == [[[2, 6]]] * tensor


def test_draws_follow_the_distribution_and_no_layout(workers: PoolKeeper) -> None:
    number = 1500
    (alone,) = workers(1).run(chosen, tensor=1, num_draws=number)
    assert workers(2).run(chosen, tensor=2, num_draws=number) == [alone, alone]
    logits = [[0.0] * VOCABULARY, [0.0] * VOCABULARY]
    logits[0][2], logits[1][6] = 3.0, 4.0
    for row in range(2):
        weights = [0.0 if token == IMAGE_TOKEN else math.exp(logits[row][token] / 2) for token in range(VOCABULARY)]
        for token, weight in enumerate(weights):
            share = weight / sum(weights)
            deviation = math.sqrt(share * (1 - share) / number)
            found = sum(tokens[row] == token for tokens in alone) / number
            assert abs(found - share) <= 4 * deviation, (row, token)
