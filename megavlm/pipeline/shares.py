"""Which rank encodes which image of a microbatch, where all ranks encode: equal finishing times, not equal counts."""

from collections.abc import Sequence

import numpy as np


def share_images(image_costs: Sequence[Sequence[float]], rank_loads: Sequence[Sequence[float]]) -> list[list[int]]:
    """Give every image to a rank so that encoder and language model together load the ranks evenly.

    Longest image first, to the rank that has least so far. What a microbatch leaves uneven is made up for in the next
    one. A rank with fewer layers of the language model thus encodes more.

    Args:
        image_costs: per microbatch the cost of each image, forward and backward together.
        rank_loads: per microbatch the cost of each rank's language-model work on it, in the same unit.

    Returns:
        Per microbatch the rank of each image.
    """
    assert len(image_costs) == len(rank_loads), (len(image_costs), len(rank_loads))
    owners: list[list[int]] = []
    total_R: np.ndarray | None = None
    for costs, loads in zip(image_costs, rank_loads, strict=True):
        loads_R = np.asarray(loads, dtype=np.float64)
        total_R = loads_R if total_R is None else total_R + loads_R
        microbatch_owners = [0] * len(costs)
        for image in sorted(range(len(costs)), key=lambda image: (-costs[image], image)):
            rank = int(total_R.argmin())
            microbatch_owners[image] = rank
            total_R[rank] += costs[image]
        owners.append(microbatch_owners)
    return owners
