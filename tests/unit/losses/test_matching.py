"""Hard negatives and the loss of matching against plain formulae.

Shape suffixes: N rows, M candidates, D width, E pairs, 2 classes.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from megavlm.losses.matching import gumbel_noise, hard_negatives, matching_loss, share_out

NUM_ROWS, WIDTH = 7, 5


def embeddings(seed):
    return F.normalize(torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=-1)


def contents(shown=range(NUM_ROWS), said=range(NUM_ROWS)):
    return torch.tensor(list(zip(shown, (100 + number for number in said), strict=True)))


def chosen(scale=3.0, seeds=None, num_choices=1, contents_MX=None):
    contents_MX = contents() if contents_MX is None else contents_MX
    scale = torch.tensor(scale)
    return hard_negatives(embeddings(0), embeddings(1), scale, contents_MX, contents_MX, seeds, num_choices)


def test_the_hardest_are_the_most_similar_of_other_rows():
    cosines = (embeddings(0) @ embeddings(1).T).fill_diagonal_(-2)
    assert chosen()[:, 0].tolist() == cosines.argmax(1).tolist()
    assert chosen(num_choices=9)[:, :6].tolist() == cosines.argsort(1, descending=True)[:, :6].tolist()
    assert set(chosen(num_choices=9)[:, 6:].flatten().tolist()) == {-1}, "there are but six others"


def test_rows_that_show_or_say_the_same_are_no_negatives():
    same = contents(shown=[0, 0, 2, 3, 4, 5, 6], said=[0, 1, 2, 2, 4, 5, 6])
    cosines = (embeddings(0) @ embeddings(1).T).fill_diagonal_(-2)
    for one, other in ((0, 1), (2, 3)):
        cosines[one, other] = cosines[other, one] = -2
    assert chosen(contents_MX=same)[:, 0].tolist() == cosines.argmax(1).tolist()
    alike = contents(shown=[0] * NUM_ROWS)
    assert set(chosen(contents_MX=alike, num_choices=3).flatten().tolist()) == {-1}


def test_draws_are_as_likely_as_softmax_says():
    """Over 1,500 draws of each row; the bound is five standard deviations of the worst share."""
    draws = 1500
    counts = torch.zeros(NUM_ROWS, NUM_ROWS)
    for draw in range(draws):
        found = chosen(seeds=[(3, draw, row) for row in range(NUM_ROWS)], num_choices=2)
        assert (found[:, 0] != found[:, 1]).all()
        counts[torch.arange(NUM_ROWS), found[:, 0]] += 1
    logits = (3.0 * embeddings(0) @ embeddings(1).T).fill_diagonal_(-math.inf)
    assert float((counts / draws - logits.softmax(1)).abs().max()) < 5 * 0.5 / math.sqrt(draws)
    assert float((counts / draws).max()) > 0.1 + 1 / (NUM_ROWS - 1), "they are not alike"


def test_draws_depend_on_their_seeds_alone():
    assert torch.equal(gumbel_noise((1, 2, 3), 4), gumbel_noise([1, 2, 3], 6)[:4])
    assert not torch.equal(gumbel_noise((1, 2, 3), 4), gumbel_noise((1, 3, 3), 4))
    noise = gumbel_noise((5,), 200_000)
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.05)


def test_an_image_is_shown_with_so_many_texts_where_there_is_another():
    choices = torch.tensor([[2, 0, -1], [2, 1, 0], [2, 1, 0], [2, 1, -1], [-1, -1, -1]])
    assert share_out(choices, 9) == [2, 2, 2, 2, -1]
    assert share_out(choices, 2) == [2, 2, 1, 1, -1]
    assert share_out(choices, 1) == [2, 1, 0, 2, -1]


def test_is_cross_entropy_over_two_classes():
    logits_E2 = torch.tensor([[0.5, 2.0], [1.0, -1.0], [0.0, 0.3], [2.0, 2.0]], requires_grad=True)
    matches_E = torch.tensor([True, False, False, True])
    loss, figures = matching_loss(logits_E2, matches_E)
    score_E = logits_E2[:, 1] - logits_E2[:, 0]
    expected = F.binary_cross_entropy_with_logits(score_E, matches_E.float(), reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert {name: float(value) for name, value in figures.items()} == {
        "count/match": 2,
        "count/no_match": 2,
        "right/match": 1,
        "right/no_match": 1,
    }
