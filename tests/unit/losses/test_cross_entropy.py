import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megavlm.losses.cross_entropy import cross_entropy

NUM_TOKENS, VOCABULARY = 13, 20
WEIGHTS = {
    "ones": torch.ones(NUM_TOKENS),
    "masked": (torch.arange(NUM_TOKENS) % 3 == 0).float(),
    "fractions": torch.linspace(0, 2, NUM_TOKENS),
    "nothing": torch.zeros(NUM_TOKENS),
}


def example():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(NUM_TOKENS, VOCABULARY, generator=generator)
    return logits, torch.randint(VOCABULARY, (NUM_TOKENS,), generator=generator)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_equals_torch(num_ranks, weights, workers):
    logits, labels = example()
    weights = WEIGHTS[weights]
    theirs = logits.clone().requires_grad_()
    expected = (F.cross_entropy(theirs, labels, reduction="none") * weights).sum()
    expected.backward()
    results = workers(num_ranks).run(sharded, logits=logits, labels=labels, weights=weights)
    for loss_sum, count, _ in results:
        torch.testing.assert_close(loss_sum, expected.detach(), rtol=1e-6, atol=1e-6)
        assert count == weights.sum() and count.dtype == torch.float32
    whole = torch.cat([gradient for _, _, gradient in results], dim=1)
    torch.testing.assert_close(whole, theirs.grad, rtol=1e-5, atol=1e-6)
    assert not whole[weights == 0].any()


def sharded(logits, labels, weights):
    group = dist.group.WORLD
    part = logits.chunk(group.size(), dim=1)[group.rank()].clone().requires_grad_()
    loss_sum, count, metrics = cross_entropy(part, labels, weights, group)
    loss_sum.backward()
    assert metrics == {}
    return loss_sum.detach(), count, part.grad
