"""Local search: items change places between bins until the fullest bin cannot be made less full.

The loads are of several resources at once (what the encoder does, what the language model does); a bin is as full as
the resource of which it has most. What is tried for the fullest bin, in this order: one of its items (or none) for one
of another bin (or none), over many bins; then up to two for up to two, over the bins that have least where it has
most. The best try is taken if both bins are then less full than the fullest was.

Shape suffixes: V resources, N items, B bins, A subsets of the fullest bin's items, C subsets of other bins' items.
"""

import functools
from dataclasses import dataclass

import numpy as np

_MANY_TRIES = 1 << 13
"""Pairs of items that are looked at in one go."""
_NUM_PARTNERS = 8
"""Bins that are tried with two items for two."""
_MOST_ITEMS = 10
"""Of a bin that holds more, so many are tried in twos."""
_MOST_FAILURES = 8
"""Bins that could not be made less full before the search ends."""
_LEAST_TRIES = 64
"""The search ends after as many tries as there are bins, but not before so many."""
_LEAST_GAIN = 1e-9
"""Less than that, in mean loads, is rounding."""


def in_even_loads(costs_N: np.ndarray, num_bins: int) -> np.ndarray:
    """Costs in units of an even load: what bins have when the largest items are alone and all else is even.

    Args:
        costs_N: float64, at least 0.
        num_bins: at least 1.

    Returns:
        float64 [N], at most 1.
    """
    descending_N = np.sort(costs_N)[::-1][:num_bins]
    before_N = np.concatenate(([0.0], np.cumsum(descending_N)[:-1]))
    even_N = (costs_N.sum() - before_N) / (num_bins - np.arange(len(descending_N)))
    # The first that is no more than an even load of what is left; if there is none, each item has a bin for itself.
    is_even_N = descending_N <= even_N
    even = even_N[is_even_N.argmax()] if is_even_N.any() else descending_N[-1]
    return np.minimum(costs_N / even, 1.0) if even > 0 else (costs_N > 0).astype(np.float64)


def even_out(
    costs_VN: np.ndarray,
    bins_N: np.ndarray,
    num_bins: int,
    *,
    sizes_N: np.ndarray | None = None,
    capacity: int = 0,
    keep_counts: bool = False,
    tolerance: float = 0.0,
) -> np.ndarray:
    """Lower the largest load by exchanging items. Deterministic.

    Loads are compared in even loads (see `in_even_loads`): an item that alone is more counts as just one, so that its
    bin is full without anything else, and the others are evened out among themselves.

    Args:
        costs_VN: float64, at least 0: what an item takes of each resource, in any unit.
        bins_N: int64, where the items are; not changed.
        num_bins: B.
        sizes_N: int64, what an item takes of the capacity; None: bins are not limited.
        capacity: of a bin; bins_N respects it, and so does the result.
        keep_counts: True: every bin keeps its number of items.
        tolerance: the search ends when no load is above 1 + tolerance even loads.

    Returns:
        int64 bin of each item. A bin that had an item still has one.
    """
    used = [in_even_loads(costs_N, num_bins) for costs_N in costs_VN if costs_N.any()]
    if not used:
        return bins_N.copy()
    search = _Search(np.stack(used), bins_N, num_bins, sizes_N, capacity, keep_counts)
    is_stuck_B = np.zeros(num_bins, dtype=bool)
    num_failures = 0
    for _ in range(max(num_bins, _LEAST_TRIES)):
        # Whoever has an item alone is not helped by handing it on.
        fullness_B = np.where(is_stuck_B | (search.counts_B <= 1), 0.0, search.loads_VB.max(axis=0))
        fullest = int(fullness_B.argmax())
        if fullness_B[fullest] <= 1 + tolerance or num_failures >= _MOST_FAILURES:
            break
        partner = search.improve(fullest)
        if partner is None:
            # Costs are often multiples of a tile's: bins that are exactly as full are no use trying either.
            is_stuck_B |= np.abs(fullness_B - fullness_B[fullest]) < 1e-9
            num_failures += 1
        else:
            is_stuck_B[partner] = False
    return search.bins_N


@dataclass(frozen=True)
class _Subsets:
    """Items, or pairs of them, that may leave a bin together; A of them.

    Attributes:
        first_A: an item; N stands for none.
        second_A: another.
        bin_A: where they are.
        shares_VA: their sum.
        sizes_A: their sum.
        counts_A: 0, 1 or 2.
    """

    first_A: np.ndarray
    second_A: np.ndarray
    bin_A: np.ndarray
    shares_VA: np.ndarray
    sizes_A: np.ndarray
    counts_A: np.ndarray


class _Search:
    """Where the items are, and what that makes of the bins."""

    def __init__(
        self,
        shares_VN: np.ndarray,
        bins_N: np.ndarray,
        num_bins: int,
        sizes_N: np.ndarray | None,
        capacity: int,
        keep_counts: bool,
    ) -> None:
        sizes_N = np.zeros(len(bins_N), dtype=np.int64) if sizes_N is None else sizes_N
        self.bins_N = bins_N.copy()
        self.keep_counts = keep_counts
        # One item more than there are: number N, which is nothing.
        self._shares = np.concatenate((shares_VN, np.zeros((len(shares_VN), 1))), axis=1)
        self._sizes = np.append(sizes_N, 0)
        self.counts_B = np.bincount(bins_N, minlength=num_bins)
        self.loads_VB = np.stack([np.bincount(bins_N, weights=row, minlength=num_bins) for row in shares_VN])
        used_B = np.zeros(num_bins, dtype=np.int64)
        np.add.at(used_B, bins_N, sizes_N)
        self._rooms_B = capacity - used_B
        assert capacity == 0 or (self._rooms_B >= 0).all(), "a bin is over its capacity"

    def improve(self, fullest: int) -> int | None:
        """Make a bin less full by an exchange with another; returns the other, None if there is no such exchange."""
        excess_V = np.maximum(self.loads_VB[:, fullest] - 1, 0)
        # Of what this bin has too much the best partners have least.
        order = np.argsort(excess_V @ self.loads_VB, kind="stable")
        partners = order[order != fullest]
        mine = self._of_bins(np.array([fullest]))
        mean_items = 1 + len(self.bins_N) // len(self.counts_B)
        num_partners = max(4, _MANY_TRIES // (len(mine.first_A) * mean_items))
        partner = self._exchange(mine, self._of_bins(partners[:num_partners]))
        if partner is not None:
            return partner
        mine = self._in_twos(fullest)
        for candidate in partners[:_NUM_PARTNERS].tolist():
            if self._exchange(mine, self._in_twos(candidate)) is not None:
                return candidate
        return None

    def _of_bins(self, bins: np.ndarray) -> _Subsets:
        """Every item of the bins for itself, and nothing of each bin."""
        is_asked_B = np.zeros(len(self.counts_B), dtype=bool)
        is_asked_B[bins] = True
        items = np.flatnonzero(is_asked_B[self.bins_N])
        none = len(self.bins_N)
        first = np.concatenate((items, np.full(len(bins), none)))
        return self._subsets(first, np.full(len(first), none), np.concatenate((self.bins_N[items], bins)))

    def _in_twos(self, bin: int) -> _Subsets:
        """Up to two items of a bin."""
        items = np.flatnonzero(self.bins_N == bin)
        if len(items) > _MOST_ITEMS:  # of all sizes
            items = items[np.argsort(self._shares[:, items].sum(axis=0), kind="stable")]
            items = items[np.linspace(0, len(items) - 1, _MOST_ITEMS).astype(np.int64)]
        none = len(self.bins_N)
        items = np.append(items, none)
        first, second = _pairs(len(items))
        return self._subsets(
            np.append(items[first], none), np.append(items[second], none), np.full(len(first) + 1, bin)
        )

    def _subsets(self, first_A: np.ndarray, second_A: np.ndarray, bin_A: np.ndarray) -> _Subsets:
        none = len(self.bins_N)
        return _Subsets(
            first_A,
            second_A,
            bin_A,
            self._shares[:, first_A] + self._shares[:, second_A],
            self._sizes[first_A] + self._sizes[second_A],
            (first_A != none).astype(np.int64) + (second_A != none),
        )

    def _exchange(self, mine: _Subsets, theirs: _Subsets) -> int | None:
        """Make the exchange after which the fuller of both bins is least full, if that is less than it was.

        Returns:
            The other bin; None if nothing was exchanged.
        """
        fullest = int(mine.bin_A[0])
        fuller_AC: np.ndarray | float = 0.0
        for load_B, mine_A, theirs_C in zip(self.loads_VB, mine.shares_VA, theirs.shares_VA, strict=True):
            moved_AC = mine_A[:, None] - theirs_C[None]
            here_AC = load_B[fullest] - moved_AC
            there_AC = load_B[theirs.bin_A] + moved_AC
            fuller_AC = np.maximum(fuller_AC, np.maximum(here_AC, there_AC))
        fuller_AC = np.where(self._is_allowed(mine, theirs), fuller_AC, np.inf)
        best = int(fuller_AC.argmin())
        row, column = divmod(best, len(theirs.bin_A))
        if fuller_AC[row, column] >= self.loads_VB[:, fullest].max() - _LEAST_GAIN:
            return None
        partner = int(theirs.bin_A[column])
        self._move(mine, row, fullest, partner)
        self._move(theirs, column, partner, fullest)
        return partner

    def _is_allowed(self, mine: _Subsets, theirs: _Subsets) -> np.ndarray:
        """Whether both bins keep to their capacity and keep an item (or their number of items): bool [A, C]."""
        moved_AC = mine.sizes_A[:, None] - theirs.sizes_A[None]
        fullest = int(mine.bin_A[0])
        fits_AC = (moved_AC <= self._rooms_B[theirs.bin_A]) & (-moved_AC <= self._rooms_B[fullest])
        more_AC = mine.counts_A[:, None] - theirs.counts_A[None]
        if self.keep_counts:
            return fits_AC & (more_AC == 0)
        return fits_AC & (more_AC < self.counts_B[fullest]) & (-more_AC < self.counts_B[theirs.bin_A])

    def _move(self, subsets: _Subsets, index: int, source: int, destination: int) -> None:
        for item in (int(subsets.first_A[index]), int(subsets.second_A[index])):
            if item < len(self.bins_N):
                self.bins_N[item] = destination
        self.loads_VB[:, source] -= subsets.shares_VA[:, index]
        self.loads_VB[:, destination] += subsets.shares_VA[:, index]
        self._rooms_B[source] += subsets.sizes_A[index]
        self._rooms_B[destination] -= subsets.sizes_A[index]
        self.counts_B[source] -= subsets.counts_A[index]
        self.counts_B[destination] += subsets.counts_A[index]


@functools.lru_cache(maxsize=_MOST_ITEMS + 1)
def _pairs(number: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of different numbers below `number`."""
    return np.triu_indices(number, k=1)
