"""The nearest of many embeddings, in bounded memory.

Shape suffixes: Q queries, N items, D values of an embedding, K neighbours, M pairs.
"""

import torch

CHUNK_QUERIES = 1024
CHUNK_ITEMS = 16384
"""Similarities that are in memory at once: 64 MiB."""


def nearest(
    queries_QD: torch.Tensor, items_ND: torch.Tensor, own_M2: torch.Tensor, num_neighbours: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The items of largest inner product for each query, its own left out.

    Args:
        queries_QD: float32.
        items_ND: float32.
        own_M2: int64 pairs of (query, item) that are left out.
        num_neighbours: of each query; fewer where there are not as many items.

    Returns:
        float32 inner products [Q, K], largest first, and int64 items [Q, K]; where a query's own items leave fewer,
        -inf and -1.
    """
    num_found = min(num_neighbours, len(items_ND))
    best_QK = torch.full((len(queries_QD), num_found), -torch.inf)
    which_QK = torch.full((len(queries_QD), num_found), -1, dtype=torch.int64)
    for start in range(0, len(queries_QD), CHUNK_QUERIES):
        stop = min(start + CHUNK_QUERIES, len(queries_QD))
        own_here_M2 = own_M2[(own_M2[:, 0] >= start) & (own_M2[:, 0] < stop)]
        for first in range(0, len(items_ND), CHUNK_ITEMS):
            last = min(first + CHUNK_ITEMS, len(items_ND))
            products = queries_QD[start:stop] @ items_ND[first:last].T
            own = own_here_M2[(own_here_M2[:, 1] >= first) & (own_here_M2[:, 1] < last)]
            products[own[:, 0] - start, own[:, 1] - first] = -torch.inf
            values, places = products.topk(min(num_found, last - first), dim=1)
            places = torch.where(values == -torch.inf, -1, places + first)
            values = torch.cat([best_QK[start:stop], values], dim=1)
            places = torch.cat([which_QK[start:stop], places], dim=1)
            best_QK[start:stop], chosen = values.topk(num_found, dim=1)
            which_QK[start:stop] = places.gather(1, chosen)
    return best_QK, which_QK
