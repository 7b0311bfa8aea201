import pytest
import torch

from megavlm.errors import UseError
from megavlm.losses.reductions import REDUCTION_POWERS, reduced_weights

# Two samples of 4 and 9 learnt tokens (with some prompt), and padding.
BORDERS = torch.tensor([0, 6, 18, 20], dtype=torch.int32)
WEIGHTS = torch.tensor([0.0] * 2 + [1.0] * 4 + [0.0] * 3 + [1.0] * 9 + [0.0] * 2)
LOSSES = torch.linspace(0.1, 3.0, 20)


def mean(reduction):
    weights = reduced_weights(WEIGHTS, BORDERS, reduction)
    return (LOSSES * weights).sum() / weights.sum()


def test_each_reduction_is_the_mean_it_says():
    """InternVL 2.5's definition: the loss of each token is weighted by x^-p, x its sample's tokens, p 0, 1/2 or 1."""
    first, second = LOSSES[2:6], LOSSES[9:18]
    torch.testing.assert_close(mean("token"), torch.cat((first, second)).mean())
    torch.testing.assert_close(mean("sample"), (first.mean() + second.mean()) / 2)
    torch.testing.assert_close(mean("square"), (first.sum() / 2 + second.sum() / 3) / (4 / 2 + 9 / 3))


def test_samples_may_be_split_over_rows():
    """Sums and counts of two rows add up to those of one."""
    whole = reduced_weights(WEIGHTS, BORDERS, "square")
    rows = [
        reduced_weights(WEIGHTS[:6], torch.tensor([0, 6]), "square"),
        reduced_weights(WEIGHTS[6:], torch.tensor([0, 12, 14]), "square"),
    ]
    assert torch.equal(torch.cat(rows), whole)


def test_token_changes_nothing():
    assert reduced_weights(WEIGHTS, BORDERS, "token") is WEIGHTS


@pytest.mark.parametrize("reduction", REDUCTION_POWERS)
def test_weights_of_rows_and_tokens_keep_their_ratio(reduction):
    """A row of weight 3 counts three times what it counts with weight 1."""
    heavier = WEIGHTS * torch.where(torch.arange(20) < 6, 3.0, 1.0)
    ratio = reduced_weights(heavier, BORDERS, reduction) / reduced_weights(WEIGHTS, BORDERS, reduction)
    assert ratio[2:6].tolist() == pytest.approx([3.0] * 4) and ratio[9:18].tolist() == [1.0] * 9


@pytest.mark.parametrize("reduction", REDUCTION_POWERS)
def test_nothing_to_learn_stays_nothing(reduction):
    assert not reduced_weights(torch.zeros(20), BORDERS, reduction).any()


def test_an_unknown_reduction_is_named():
    with pytest.raises(UseError, match="^loss_reduction: got mean"):
        reduced_weights(WEIGHTS, BORDERS, "mean")
