import torch

from megavlm.losses.sequences import length_desensitised_weights, samples_of_tokens, sums_per_sample

# Three samples, the last one empty; two prompt tokens each, answers of 3 and 5 tokens.
BORDERS = torch.tensor([0, 5, 12, 12], dtype=torch.int32)
ANSWER = torch.tensor([0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1]).bool()


def test_tokens_know_their_sample():
    assert samples_of_tokens(BORDERS).tolist() == [0] * 5 + [1] * 7


def test_sums_are_those_of_slices_and_carry_gradients():
    values = torch.linspace(-3, 1, 12).bfloat16().requires_grad_()
    sums = sums_per_sample(values, samples_of_tokens(BORDERS), 3)
    assert sums.dtype == torch.float32 and sums[2] == 0
    torch.testing.assert_close(sums[:2], torch.stack([values[:5].float().sum(), values[5:].float().sum()]))
    (sums * torch.tensor([2.0, 3.0, 5.0])).sum().backward()
    assert values.grad.tolist() == [2.0] * 5 + [3.0] * 7


def test_parts_of_a_row_add_up():
    """What two context-parallel ranks do: each sums its own tokens."""
    values, samples = torch.linspace(-3, 1, 12), samples_of_tokens(BORDERS)
    parts = [sums_per_sample(values[part], samples[part], 3) for part in (slice(0, None, 2), slice(1, None, 2))]
    torch.testing.assert_close(parts[0] + parts[1], sums_per_sample(values, samples, 3))


def test_tokens_beyond_the_shorter_answer_count_less():
    weights = length_desensitised_weights(ANSWER, BORDERS, torch.tensor([3, 3, 3]), 0.25)
    assert weights.tolist() == [0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0.25, 0.25]
    assert torch.equal(length_desensitised_weights(ANSWER, BORDERS, torch.tensor([3, 3, 3]), 1.0), ANSWER.float())
