"""Greedy choice, also over a vocabulary that is split."""

import pytest

from tests.pool import PoolKeeper

IMAGE_TOKEN, VOCABULARY = 5, 8


def chosen(tensor: int) -> list[int]:
    """On every rank: the choice after two rows whose likeliest token would be an image's placeholder, and token 6."""
    import torch

    from megavlm.config.schema import ParallelConfig
    from megavlm.data.sample import Batch
    from megavlm.parallel.groups import initialize
    from megavlm.rollout.native import _next_tokens

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
    return _next_tokens(lambda row, choose: choose(part, row), batch, last, groups, 2, IMAGE_TOKEN)


@pytest.mark.parametrize("tensor", [1, 2])
def test_an_image_is_never_answered(workers: PoolKeeper, tensor: int) -> None:
    assert workers(tensor).run(chosen, tensor=tensor) == [[2, 6]] * tensor
