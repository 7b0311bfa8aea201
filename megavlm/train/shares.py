"""Who encodes which image: the images of every microbatch, shared out over encoders by exact cost.

Every rank computes the same shares, for the data ranks that concern it, without talking.

Index letters: M microbatches, D data ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megavlm.config.inputs import Grid
from megavlm.parallel.topology import Replica, Topology
from megavlm.pipeline.shares import share_images


@dataclass(frozen=True, order=True)
class ImageKey:
    """An image of one microbatch: the data rank whose row it is in, and its place among that row's images."""

    data: int
    number: int


@dataclass(frozen=True)
class MicrobatchShares:
    """The images of one microbatch (the rows with that number of all data ranks) and their encoders.

    Attributes:
        grids: patch grid of every image.
        owners: number of the replica that encodes it.
    """

    grids: Mapping[ImageKey, Grid]
    owners: Mapping[ImageKey, int]

    def images_of(self, replica: int, data: int | None = None) -> list[ImageKey]:
        """What a replica encodes, in the order in which it does; `data`: only for that data rank."""
        return [key for key in sorted(self.grids) if self.owners[key] == replica and (data is None or key.data == data)]

    def images_in(self, data: int) -> list[ImageKey]:
        """Images of a data rank's row, in their order there."""
        return [key for key in sorted(self.grids) if key.data == data]


@dataclass(frozen=True)
class StepShares:
    """The shares of all microbatches that run through a schedule together."""

    microbatches: tuple[MicrobatchShares, ...]

    def costs_of(self, replica: int, cost_of: Callable[[Grid], float]) -> list[float]:
        """Cost of a replica's share of each microbatch."""
        return [sum(cost_of(one.grids[key]) for key in one.images_of(replica)) for one in self.microbatches]


def share_step(
    topology: Topology,
    grids_MD: Sequence[Mapping[int, Sequence[Grid]]],
    cost_of: Callable[[Grid], float],
    load_of: Callable[[Replica, int], float] | None = None,
) -> StepShares:
    """Share out images: costliest first, each to the replica that may encode it and has the least to do so far.

    What one microbatch leaves uneven is made up for in the next one.

    Args:
        topology: the encoders, and whom each serves.
        grids_MD: per microbatch, by data rank, the patch grids of the row's images in order. Data ranks that do not
            concern this rank may be missing.
        cost_of: of encoding an image, forward and backward together.
        load_of: cost of the language model's work that a replica's rank has on a microbatch, in the same unit; None:
            the encoder does not take turns with it.
    """
    owners: list[dict[ImageKey, int]] = [{} for _ in grids_MD]
    for pool, served in _pools(topology, {data for grids_D in grids_MD for data in grids_D}):
        keys_M = [
            [ImageKey(data, number) for data in served for number in range(len(grids_D[data]))] for grids_D in grids_MD
        ]
        costs_M = [
            [cost_of(grids_D[key.data][key.number]) for key in keys]
            for grids_D, keys in zip(grids_MD, keys_M, strict=True)
        ]
        loads_M = [[load_of(replica, m) if load_of else 0.0 for replica in pool] for m in range(len(grids_MD))]
        for found, keys, chosen in zip(owners, keys_M, share_images(costs_M, loads_M), strict=True):
            found.update({key: pool[index].number for key, index in zip(keys, chosen, strict=True)})
    return StepShares(
        tuple(
            MicrobatchShares(
                {ImageKey(d, i): grid for d, grids in grids_D.items() for i, grid in enumerate(grids)}, found
            )
            for grids_D, found in zip(grids_MD, owners, strict=True)
        )
    )


def _pools(topology: Topology, data_ranks: set[int]) -> list[tuple[tuple[Replica, ...], list[int]]]:
    """(replicas, data ranks whose images they share out among themselves)."""
    pools: dict[tuple[Replica, ...], list[int]] = {}
    for data in sorted(data_ranks):
        pools.setdefault(topology.serving(data), []).append(data)
    return list(pools.items())
