"""Spread items of known cost over ranks so that all finish together.

Longest processing time first: Graham, "Bounds on Multiprocessing Timing Anomalies", SIAM J. Appl. Math. 17(2), 1969
(never worse than 4/3 - 1/(3 ranks) of the best). Then items change places as long as the fullest rank gains by it.
"""

import heapq
from collections.abc import Sequence

import numpy as np

from megavlm.data.exchange import even_out

_GOOD_ENOUGH = 1e-3
"""Above the mean: a rank that has only so much more is left alone."""


def spread(costs: Sequence[float] | np.ndarray, num_ranks: int) -> np.ndarray:
    """Assign each item to a rank so that the largest load of a rank is about as small as it can be.

    Deterministic: ties go to the earlier item and the lower rank, so that every rank computes the same.

    Args:
        costs: of each item, at least 0.
        num_ranks: at least 1.

    Returns:
        int64 rank of each item.
    """
    array = np.asarray(costs, dtype=np.float64)
    assert num_ranks >= 1 and np.isfinite(array).all() and (array >= 0).all()
    ranks = longest_first(array, num_ranks)
    return even_out(array[None], ranks, num_ranks, tolerance=_GOOD_ENOUGH)


def longest_first(costs: np.ndarray, num_ranks: int) -> np.ndarray:
    """The costliest item first, each to the rank with the least so far: int64 rank of each item."""
    loads = [(0.0, rank) for rank in range(num_ranks)]
    order = np.argsort(-costs, kind="stable")
    chosen = []
    for cost in costs[order].tolist():
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + cost, rank))
        chosen.append(rank)
    ranks = np.empty(len(costs), dtype=np.int64)
    ranks[order] = chosen
    return ranks


def imbalance(costs: Sequence[float] | np.ndarray, ranks: np.ndarray, num_ranks: int) -> float:
    """Largest load over mean load; 1.0 is perfect."""
    loads = np.bincount(ranks, weights=np.asarray(costs, dtype=np.float64), minlength=num_ranks)
    return float(loads.max() / loads.mean())
