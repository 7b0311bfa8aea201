import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.data.inspect.likeness import MAX_DISTANCE, first_alike, near_pairs
from megavlm.errors import UseError


def hashes_of(num: int, seed: int, num_bytes: int = 32) -> np.ndarray:
    """Random hashes, of which many are others with some bits flipped."""
    random = np.random.default_rng(seed)
    hashes = random.integers(0, 256, (num, num_bytes), dtype=np.uint8)
    for number in range(1, num):
        if random.random() < 0.6:
            bits = np.unpackbits(hashes[random.integers(number)])
            bits[random.permutation(len(bits))[: random.integers(0, 40)]] ^= 1
            hashes[number] = np.packbits(bits)
    return hashes


def distance(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.unpackbits(one ^ other).sum())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**32 - 1), st.integers(0, MAX_DISTANCE), st.sampled_from([8, 32]))
def test_pairs_are_those_of_comparing_all(num: int, seed: int, most: int, num_bytes: int) -> None:
    hashes = hashes_of(num, seed, num_bytes)
    expected = [(i, j) for j in range(num) for i in range(j) if distance(hashes[i], hashes[j]) <= most]
    assert near_pairs(hashes, most).tolist() == [list(pair) for pair in expected]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 60), st.integers(0, 2**32 - 1), st.integers(0, MAX_DISTANCE))
def test_each_is_alike_to_the_first_that_is_kept(num: int, seed: int, most: int) -> None:
    hashes = hashes_of(num, seed)
    expected: list[int] = []
    for item in range(num):
        kept = [each for each in range(item) if expected[each] == each]
        expected.append(next((each for each in kept if distance(hashes[each], hashes[item]) <= most), item))
    assert first_alike(hashes, most).tolist() == expected


@pytest.mark.parametrize("most", [1, 2, 16, MAX_DISTANCE])
def test_differences_spread_as_evenly_as_can_be(most: int) -> None:
    bits = np.zeros((2, 256), dtype=np.uint8)
    bits[1, [piece[0] for piece in np.array_split(np.arange(256), most)]] = 1
    hashes = np.packbits(bits, axis=1)
    assert near_pairs(hashes, most).tolist() == [[0, 1]]
    assert near_pairs(hashes, most - 1).tolist() == []


def test_a_chain_is_not_one_thing() -> None:
    bits = np.zeros((3, 256), dtype=np.uint8)
    bits[1, :10] = 1
    bits[2, :20] = 1
    assert first_alike(np.packbits(bits, axis=1), 12).tolist() == [0, 0, 2]


def test_work_grows_with_likeness_not_with_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = np.random.default_rng(0).integers(0, 256, (20_000, 32), dtype=np.uint8)
    compared = 0

    class Counting(np.ndarray):
        def __getitem__(self, item):
            nonlocal compared
            compared += len(item)
            return np.asarray(self)[item]

    from megavlm.data.inspect import likeness

    monkeypatch.setattr(likeness, "_POPCOUNT", likeness._POPCOUNT.view(Counting))
    assert not len(near_pairs(hashes, 16))
    assert compared < 0.001 * 20_000**2 / 2 * 17  # 17 pieces of 15 bits: 2^-15 of all pairs each


@pytest.mark.parametrize("most", [-1, MAX_DISTANCE + 1])
def test_distances_out_of_range(most: int) -> None:
    with pytest.raises(UseError, match="--max-distance"):
        first_alike(np.zeros((2, 32), dtype=np.uint8), most)
