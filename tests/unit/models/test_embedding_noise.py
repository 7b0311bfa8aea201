import torch

from megavlm.models.embedding_noise import embedding_noise

HIDDEN, ALPHA = 64, 5.0


def noise(seeds, lengths, padded, seed=1):
    """Noise of samples of so many tokens, each padded, and a segment of padding behind them."""
    borders = torch.tensor([0, *padded]).cumsum(0)
    real_T = torch.zeros(int(borders[-1]) + 3, dtype=torch.bool)
    for start, length in zip(borders.tolist(), lengths, strict=False):
        real_T[start : start + length] = True
    cu_seqlens = torch.cat((borders, borders[-1:] + 3)).to(torch.int32)
    return embedding_noise(torch.tensor(seeds), cu_seqlens, real_T, HIDDEN, ALPHA, seed)


def test_noise_is_uniform_within_the_papers_bound_and_nothing_on_padding():
    noise_TH = noise([7, 8], [40, 100], [48, 104])
    for start, length in ((0, 40), (48, 100)):
        bound = ALPHA / (length * HIDDEN) ** 0.5
        part = noise_TH[start : start + length]
        assert 0.99 * bound < part.abs().max() <= bound
        # variance of a uniform distribution; some thousand draws
        assert abs(part.std() / (bound / 3**0.5) - 1) < 0.05 and part.mean().abs() < 0.05 * bound
    assert not noise_TH[40:48].any() and not noise_TH[148:].any()


def test_a_samples_noise_does_not_depend_on_its_row():
    together, alone = noise([7, 8], [40, 100], [48, 104]), noise([8], [100], [100])
    assert torch.equal(together[48:148], alone[:100])


def test_other_steps_rows_and_runs_have_other_noise():
    drawn = [noise([one], [10], [10], seed) for one, seed in ((7, 1), (8, 1), (7, 2))]
    assert all(not torch.equal(drawn[0], other) for other in drawn[1:])


def test_a_row_that_fills_up_has_none():
    real_T = torch.zeros(6, dtype=torch.bool)
    assert not embedding_noise(torch.tensor([3]), torch.tensor([0, 6]), real_T, HIDDEN, ALPHA, 1).any()
