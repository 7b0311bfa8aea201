"""In which order sources take turns, so that each has its share of every beginning of the order.

After n draws a source of share p has been drawn floor(n p) or ceil(n p) times: never a whole draw away from its share.
Which source draw n takes is found without walking through the draws before it.

How: the j-th draw of a source has to be one of the slots floor((j - 1) / p) to ceil(j / p) - 1; these windows are those
of Baruah, Cohen, Plaxton and Varvel, "Proportionate progress: a notion of fairness in resource allocation",
Algorithmica 15(6), 1996, who show that an order in which every draw is in its window exists. Earliest deadline first
finds one. It is begun anew every `window` draws, from counts that depend on the number of draws alone (`_counts_at`).

Why the pieces fit together: draws of one slot each fit into their windows if and only if no interval of slots has to
hold more draws than it has slots. The counts at a border are chosen so that what is left after it can be drawn in time,
and so that what is done before it could have been. Then intervals that begin at a piece's first border, that end at its
last one, or that touch neither all hold what they have to, and the whole piece holds as many draws as it has slots.

Shape suffixes: S sources, D draws, L slots that are looked back at.
"""

import bisect
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np

_LARGEST_CYCLE = 2**31 - 1
"""Products of a draw and a weight have to fit into int64."""
_ROUNDED_CYCLE = 2**30
"""Weights whose common denominator is larger are rounded to parts of this."""
_SHORTEST_WINDOW = 1024
_LONGEST_WINDOW = 2**20
_KEPT_WINDOWS = 4
LEAST_SHARE = 1 / _LONGEST_WINDOW
"""Of a source."""


class Turns(Protocol):
    """An order of sources without an end; sources are numbers from 0."""

    def counts(self, num_draws: int) -> np.ndarray:
        """int64 [S]: how often each source is drawn in the first draws."""

    def draws(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [D] each: the source of draws `first` to `last - 1`, and how often that was drawn before."""


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The same shares as whole numbers: exact for decimals, within 1e-9 of the whole for all others.

    Args:
        weights: above 0, with at least `LEAST_SHARE` of their sum each.
    """
    fractions = [Fraction(repr(float(weight))) for weight in weights]
    denominator = math.lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * denominator) for fraction in fractions]
    divisor = math.gcd(*whole)
    if sum(whole) // divisor <= _LARGEST_CYCLE:
        return tuple(weight // divisor for weight in whole)
    total = sum(fractions)
    rounded = [max(1, round(fraction / total * _ROUNDED_CYCLE)) for fraction in fractions]
    return tuple(weight // math.gcd(*rounded) for weight in rounded)


class Interleave:
    """Sources by their weights; see the top of this file."""

    def __init__(self, weights: Sequence[int]) -> None:
        """Weights as `whole_weights` gives them."""
        self._weights_S = np.array(weights, dtype=np.int64)
        self._cycle = int(self._weights_S.sum())
        assert self._weights_S.min() >= 1 and self._cycle <= _LARGEST_CYCLE, weights
        # A source has a turn in every window: what is drawn before a border is not undone at the next.
        self._window = max(_SHORTEST_WINDOW, -(-self._cycle // int(self._weights_S.min())))
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def counts(self, num_draws: int) -> np.ndarray:
        """int64 [S]: how often each source is drawn in the first draws."""
        cycles, rest = divmod(num_draws, self._cycle)
        before_S, sources_D = self._piece(rest // self._window)
        taken_D = sources_D[: rest % self._window]
        return cycles * self._weights_S + before_S + np.bincount(taken_D, minlength=len(before_S))

    def draws(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [D] each: the source of draws `first` to `last - 1`, and how often that was drawn before."""
        sources, ordinals = [], []
        while first < last:
            cycle, rest = divmod(first, self._cycle)
            before_S, piece_D = self._piece(rest // self._window)
            start = rest % self._window
            taken_D = piece_D[start : start + last - first]
            counts_S = cycle * self._weights_S + before_S + np.bincount(piece_D[:start], minlength=len(before_S))
            sources.append(taken_D)
            ordinals.append(counts_S[taken_D] + _times_before(taken_D))
            first += len(taken_D)
        none = np.zeros(0, dtype=np.int64)
        return np.concatenate([none, *sources]), np.concatenate([none, *ordinals])

    def _piece(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(counts before it [S], sources of its draws [D]) of a window of the cycle."""
        if number not in self._kept:
            while len(self._kept) >= _KEPT_WINDOWS:
                self._kept.pop(next(iter(self._kept)))
            first = number * self._window
            last = min(first + self._window, self._cycle)
            before_S = self._counts_at(first)
            self._kept[number] = (before_S, self._in_time(first, last, before_S, self._counts_at(last)))
        return self._kept[number]

    def _counts_at(self, num_draws: int) -> np.ndarray:
        """int64 [S]: counts after so many draws of a cycle, from which one can go on and to which one can come.

        Every source has floor(n p); some have one more. One can go on if of the next draws with a deadline of at most t
        enough are done, for every t; one can have come if not too many are done that could be drawn from slot s on
        only, for every s. The second are bounds on sets that contain each other, a matroid: taking the earliest
        deadlines first, as far as the bounds allow, does most for the first.
        """
        weights_S, cycle = self._weights_S, self._cycle
        counts_S = num_draws * weights_S // cycle
        num_more = num_draws - int(counts_S.sum())
        if not num_more:
            return counts_S
        open_S = np.flatnonzero(num_draws * weights_S % cycle)
        releases_S = counts_S[open_S] * cycle // weights_S[open_S]
        deadlines_S = -(-(counts_S[open_S] + 1) * cycle // weights_S[open_S])
        slots_L = np.arange(int(releases_S.min()), int(releases_S.max()) + 1)
        most_L = num_draws - slots_L
        for weight, count in zip(weights_S.tolist(), counts_S.tolist(), strict=True):
            most_L = most_L - np.maximum(0, count + (-(slots_L * weight) // cycle))  # the ceiling, negative
        levels, at_S = np.unique(releases_S, return_inverse=True)
        # How many more may be taken that are released at this level or later.
        left = np.minimum.reduceat(most_L, np.concatenate(([0], levels[:-1] + 1 - slots_L[0])))
        for place in np.lexsort((open_S, deadlines_S)).tolist():
            level = int(at_S[place])
            if num_more and left[: level + 1].min() >= 1:
                counts_S[open_S[place]] += 1
                left[: level + 1] -= 1
                num_more -= 1
        assert not num_more, (self._weights_S, num_draws)
        return counts_S

    def _in_time(self, first: int, last: int, before_S: np.ndarray, after_S: np.ndarray) -> np.ndarray:
        """int64 [D]: sources of the draws between two borders, earliest deadline first."""
        jobs = []
        for source, (weight, before, after) in enumerate(
            zip(self._weights_S.tolist(), before_S.tolist(), after_S.tolist(), strict=True)
        ):
            numbers = np.arange(before, after)
            releases = np.maximum(numbers * self._cycle // weight, first)
            deadlines = np.minimum(-(-(numbers + 1) * self._cycle // weight), last)
            jobs.append(np.stack((releases, deadlines, np.full(len(numbers), source))))
        jobs_3D = np.concatenate(jobs, axis=1)
        jobs_3D = jobs_3D[:, np.argsort(jobs_3D[0], kind="stable")]
        releases_D, deadlines_D, sources_D = (row.tolist() for row in jobs_3D)
        order = []
        waiting: list[tuple[int, int]] = []
        released = 0
        for slot in range(first, last):
            while released < len(releases_D) and releases_D[released] <= slot:
                heapq.heappush(waiting, (deadlines_D[released], sources_D[released]))
                released += 1
            deadline, source = heapq.heappop(waiting)
            assert deadline > slot, (self._weights_S, slot)
            order.append(source)
        return np.array(order, dtype=np.int64)


class NestedInterleave:
    """Groups of sources by the weights of the groups, and within a group by those of its sources.

    Groups keep to their shares as closely as sources of `Interleave` do; a source is at most two draws away.
    """

    def __init__(self, group_weights: Sequence[int], groups: Sequence[Sequence[int]], weights: Sequence[int]) -> None:
        """`groups` are the numbers of each group's sources; `weights` are the sources'."""
        self._groups = [np.array(group, dtype=np.int64) for group in groups]
        self._outer = Interleave(group_weights)
        self._inner = [Interleave([weights[source] for source in group]) for group in groups]

    def counts(self, num_draws: int) -> np.ndarray:
        """int64 [S]: how often each source is drawn in the first draws."""
        counts_S = np.zeros(sum(len(group) for group in self._groups), dtype=np.int64)
        outer = self._outer.counts(num_draws).tolist()
        for group, inner, count in zip(self._groups, self._inner, outer, strict=True):
            counts_S[group] = inner.counts(count)
        return counts_S

    def draws(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [D] each: the source of draws `first` to `last - 1`, and how often that was drawn before."""
        groups_D, turns_D = self._outer.draws(first, last)
        sources_D, ordinals_D = np.empty_like(groups_D), np.empty_like(groups_D)
        for number, (group, inner) in enumerate(zip(self._groups, self._inner, strict=True)):
            places = np.flatnonzero(groups_D == number)
            if len(places):
                chosen_D, ordinals_D[places] = inner.draws(int(turns_D[places[0]]), int(turns_D[places[-1]]) + 1)
                sources_D[places] = group[chosen_D]
        return sources_D, ordinals_D


def draws_until(turns: Turns, source: int, count: int) -> int:
    """After how many draws a source has been drawn `count` times (at least 1)."""
    most = count
    while turns.counts(most)[source] < count:
        most *= 2
    return bisect.bisect_left(range(most), count, key=lambda num_draws: int(turns.counts(num_draws)[source]))


def _times_before(values_D: np.ndarray) -> np.ndarray:
    """int64 [D]: how often each value stands before its place."""
    order = np.argsort(values_D, kind="stable")
    ordered_D = values_D[order]
    starts = np.searchsorted(ordered_D, ordered_D, side="left")
    before_D = np.empty(len(values_D), dtype=np.int64)
    before_D[order] = np.arange(len(values_D)) - starts
    return before_D
