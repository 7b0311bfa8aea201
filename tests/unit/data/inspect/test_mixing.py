from collections import Counter

import pytest

from megavlm.data.inspect.mixing import counts_of, draw, shares_of
from megavlm.errors import UseError


def test_shares() -> None:
    assert shares_of([300, 100]) == [0.75, 0.25]
    assert shares_of([300, 100], [1, 1]) == [0.5, 0.5]
    assert shares_of([300, 100], [0, 2]) == [0, 1]
    assert shares_of([900, 100], temperature=2) == pytest.approx([0.75, 0.25])
    assert shares_of([5, 5], [8, 1], 3) == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("weights", "temperature", "word"),
    [([1], 1, "--weights"), ([1, -1], 1, "--weights"), ([0, 0], 1, "--weights"), ([1, float("nan")], 1, "--weights"),
     ([1, 1], 0, "--temperature")],
)  # fmt: skip
def test_wrong_shares(weights: list[float], temperature: float, word: str) -> None:
    with pytest.raises(UseError, match=word):
        shares_of([10, 10], weights, temperature)


def test_counts() -> None:
    assert counts_of([0.5, 0.5], [100, 30]) == [30, 30]
    assert counts_of([0.75, 0.25], [300, 100]) == [300, 100]
    assert counts_of([0, 1], [300, 100]) == [0, 100]
    assert counts_of([1 / 3] * 3, [10] * 3, 10) == [4, 3, 3]
    assert counts_of([0.9, 0.1], [10, 10], 1000) == [900, 100]


def test_draw() -> None:
    drawn = draw([25, 3], [10, 50], seed=1)
    seen = Counter(drawn)
    assert Counter(source for source, _ in drawn) == {0: 25, 1: 3}
    assert {seen[0, row] for row in range(10)} == {2, 3}
    assert all(count == 1 for (source, _), count in seen.items() if source == 1)
    assert drawn == draw([25, 3], [10, 50], seed=1) != draw([25, 3], [10, 50], seed=2)
    assert [source for source, _ in drawn] != sorted(source for source, _ in drawn)
