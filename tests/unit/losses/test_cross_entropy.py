import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megavlm.losses.cross_entropy import cross_entropy, regularised_cross_entropy

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


# Ids from 17 on only fill up the shards: on four ranks the last one holds two real ids and three others.
@pytest.mark.parametrize("vocabulary_size", [VOCABULARY, 17])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_smoothing_and_z_loss_equal_torch(num_ranks, vocabulary_size, workers):
    logits, labels = example()
    labels = labels % vocabulary_size
    weights = WEIGHTS["fractions"]
    theirs = logits.double().requires_grad_()
    logprobs = theirs.log_softmax(1)
    if vocabulary_size == VOCABULARY:
        smoothed = F.cross_entropy(theirs, labels, reduction="none", label_smoothing=0.1)
    else:
        nll = -logprobs.gather(1, labels[:, None])[:, 0]
        smoothed = 0.9 * nll - 0.1 * logprobs[:, :vocabulary_size].mean(1)
    expected = ((smoothed + 0.01 * theirs.logsumexp(1) ** 2) * weights).sum()
    expected.backward()
    results = workers(num_ranks).run(
        sharded_and_regularised, logits=logits, labels=labels, weights=weights, vocabulary_size=vocabulary_size
    )
    for loss_sum, count, metrics, _ in results:
        torch.testing.assert_close(loss_sum, expected.detach().float(), rtol=1e-6, atol=0)
        assert count == weights.sum()
        nll = -(logprobs.gather(1, labels[:, None])[:, 0] * weights).sum()
        torch.testing.assert_close(metrics["nll"], nll.detach().float(), rtol=1e-6, atol=0)
        z = (theirs.logsumexp(1) ** 2 * weights).sum()
        torch.testing.assert_close(metrics["z"], z.detach().float(), rtol=1e-6, atol=0)
    whole = torch.cat([gradient for *_, gradient in results], dim=1)
    torch.testing.assert_close(whole, theirs.grad.float(), rtol=1e-5, atol=1e-6)


def sharded_and_regularised(logits, labels, weights, vocabulary_size):
    group = dist.group.WORLD
    part = logits.chunk(group.size(), dim=1)[group.rank()].clone().requires_grad_()
    loss_sum, count, metrics = regularised_cross_entropy(part, labels, weights, group, vocabulary_size, 0.1, 0.01)
    loss_sum.backward()
    return loss_sum.detach(), count, metrics, part.grad


def test_without_either_it_is_the_plain_cross_entropy(workers):
    logits, labels = example()
    results = workers(2).run(both, logits=logits, labels=labels, weights=WEIGHTS["fractions"])
    for (plain, plain_gradient), (regularised, gradient) in results:
        torch.testing.assert_close(regularised, plain, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, plain_gradient, rtol=1e-5, atol=1e-6)


def both(logits, labels, weights):
    group = dist.group.WORLD
    parts = [logits.chunk(group.size(), dim=1)[group.rank()].clone().requires_grad_() for _ in range(2)]
    losses = [
        cross_entropy(parts[0], labels, weights, group)[0],
        regularised_cross_entropy(parts[1], labels, weights, group, VOCABULARY)[0],
    ]
    for loss in losses:
        loss.backward()
    return [(loss.detach(), part.grad) for loss, part in zip(losses, parts, strict=True)]
