"""Images of unequal cost over ranks."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megavlm.data.spread import imbalance, spread


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60), st.integers(1, 9))
def test_within_the_bound_of_longest_first(costs, num_ranks):
    ranks = spread(costs, num_ranks)
    loads = np.bincount(ranks, weights=costs, minlength=num_ranks)
    lower = max(sum(costs) / num_ranks, max(costs))
    assert len(ranks) == len(costs) and loads.max() <= (4 / 3) * lower + max(costs) / 3 + 1e-9
    # no rank could hand its last item to the least loaded one and finish earlier than that one does
    for rank in range(num_ranks):
        mine = [cost for cost, owner in zip(costs, ranks, strict=True) if owner == rank and cost]
        assert not mine or loads[rank] - min(mine) <= loads.min() + 1e-9


def test_exact_costs_balance_32_ranks():
    generator = np.random.default_rng(0)
    patches = np.exp(generator.normal(7.0, 0.7, 512)).astype(int) + 64
    cost = patches * (2 * 1152**2 * 12) + 4 * patches.astype(float) ** 2 * 1152
    exact = imbalance(cost, spread(cost, 32), 32)
    by_count = imbalance(cost, np.arange(512) % 32, 32)
    assert exact <= 1.02 < by_count


def test_every_rank_computes_the_same():
    costs = [3, 3, 3, 1, 1, 1]
    assert spread(costs, 2).tolist() == spread(list(costs), 2).tolist() == [0, 1, 0, 1, 1, 1]
