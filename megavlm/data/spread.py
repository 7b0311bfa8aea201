"""Spread items of known cost over ranks so that all finish together.

Longest processing time first: Graham, "Bounds on Multiprocessing Timing Anomalies", SIAM J. Appl. Math. 17(2), 1969
(never worse than 4/3 - 1/(3 ranks) of the best).
"""

import heapq
from collections.abc import Sequence

import numpy as np


def spread(costs: Sequence[float] | np.ndarray, num_ranks: int) -> np.ndarray:
    """Assign each item to a rank: the costliest first, each to the rank with the least so far.

    Deterministic: ties go to the earlier item and the lower rank, so that every rank computes the same.

    Args:
        costs: of each item, at least 0.
        num_ranks: at least 1.

    Returns:
        int64 rank of each item.
    """
    array = np.asarray(costs, dtype=np.float64)
    assert num_ranks >= 1 and (array >= 0).all()
    ranks = np.zeros(len(array), dtype=np.int64)
    loads = [(0.0, rank) for rank in range(num_ranks)]
    order = np.argsort(-array, kind="stable")
    chosen = np.empty(len(array), dtype=np.int64)
    for position, cost in enumerate(array[order].tolist()):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + cost, rank))
        chosen[position] = rank
    ranks[order] = chosen
    return ranks


def imbalance(costs: Sequence[float] | np.ndarray, ranks: np.ndarray, num_ranks: int) -> float:
    """Largest load over mean load; 1.0 is perfect."""
    loads = np.bincount(ranks, weights=np.asarray(costs, dtype=np.float64), minlength=num_ranks)
    return float(loads.max() / loads.mean())
