import pytest
import torch
import torch.distributed as dist

from megavlm.losses.logprob import token_logprobs

NUM_TOKENS, VOCABULARY = 11, 16


class Alone:
    """A group of this process alone."""

    def rank(self):
        return 0

    def size(self):
        return 1


def example(scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(NUM_TOKENS, VOCABULARY, generator=generator) * scale).to(dtype)
    labels = torch.randint(VOCABULARY, (NUM_TOKENS,), generator=generator)
    # the first and last id of either half
    labels[:4] = torch.tensor([0, VOCABULARY // 2 - 1, VOCABULARY // 2, VOCABULARY - 1])
    return logits, labels, torch.randn(NUM_TOKENS, generator=generator)


def expected_of(logits, labels, upstream):
    logits = logits.clone().requires_grad_()
    logprobs = torch.log_softmax(logits.double(), -1).gather(1, labels[:, None])[:, 0]
    (logprobs * upstream).sum().backward()
    return logprobs.float(), logits.grad


@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_equals_log_softmax(scale):
    logits, labels, upstream = example(scale)
    expected, gradient = expected_of(logits, labels, upstream)
    ours = logits.clone().requires_grad_()
    actual = token_logprobs(ours, labels, Alone())
    (actual * upstream).sum().backward()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(ours.grad, gradient, rtol=1e-5, atol=1e-6)


def test_inputs_stay_as_they_are():
    logits, labels, _ = example()
    before = logits.clone(), labels.clone()
    token_logprobs(logits, labels, Alone())
    assert torch.equal(logits, before[0]) and torch.equal(labels, before[1])


def test_bf16_logits_give_fp32_logprobs_and_bf16_gradients():
    logits, labels, upstream = example(dtype=torch.bfloat16)
    expected, _ = expected_of(logits.float(), labels, upstream)
    ours = logits.clone().requires_grad_()
    actual = token_logprobs(ours, labels, Alone())
    (actual * upstream).sum().backward()
    assert actual.dtype == torch.float32 and ours.grad.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_sharded_vocabulary_makes_no_difference(num_ranks, workers):
    logits, labels, upstream = example(scale=5.0)
    expected, gradient = expected_of(logits, labels, upstream)
    results = workers(num_ranks).run(sharded, logits=logits, labels=labels, upstream=upstream)
    for actual, _ in results:
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=5e-6)
    whole = torch.cat([part for _, part in results], dim=1)
    torch.testing.assert_close(whole, gradient, rtol=1e-5, atol=1e-6)


def sharded(logits, labels, upstream):
    group = dist.group.WORLD
    part = logits.chunk(group.size(), dim=1)[group.rank()].clone().requires_grad_()
    logprobs = token_logprobs(part, labels, group)
    (logprobs * upstream).sum().backward()
    return logprobs.detach(), part.grad
