"""From the positions of a schedule to ranks: where hidden states, features and their gradients go.

Between stages a message has one sender and one receiver. Features go from every encoder that encoded images of a row
straight to the ranks that hold the language model's first stage of that row: each gets the rows of its images. Their
gradients go back: context ranks have different tokens, so each sends its part and the encoder adds them up; tensor
ranks have equal gradients, so one of them sends.
"""

from collections.abc import Callable, Iterator

import torch

from megavlm.config.inputs import Grid
from megavlm.parallel.topology import Coordinates, Replica, Topology
from megavlm.pipeline.actions import Message
from megavlm.pipeline.exchange import Route
from megavlm.train.shares import ImageKey, MicrobatchShares, StepShares


class LayoutRoutes:
    """The routes of one rank for one run through a schedule.

    Args:
        topology: of the run.
        rank: this one.
        shares: who encodes what.
        num_tokens_of: visual tokens of an image by its grid.
    """

    def __init__(self, topology: Topology, rank: int, shares: StepShares, num_tokens_of: Callable[[Grid], int]) -> None:
        self._topology, self._shares, self._num_tokens_of = topology, shares, num_tokens_of
        self._place = topology.coordinates(rank)
        self._part = topology.replica_of(rank)

    def outgoing(self, message: Message) -> list[Route]:
        """Who gets what of a message that this rank gives."""
        if message.payload in ("activation", "gradient"):
            return [Route(self._at_position(message.destination))]
        if message.payload in ("vision_activation", "vision_gradient"):
            return [Route(peer) for peer in self._encoder_stage(message, message.destination)]
        microbatch = self._shares.microbatches[message.microbatch]
        if message.payload == "features":
            return self._features_out(microbatch)
        return list(self._gradients_out(microbatch, message.destination))

    def incoming(self, message: Message) -> list[int]:
        """Ranks that parts of a message come from."""
        if message.payload in ("activation", "gradient"):
            return [self._at_position(message.source)]
        if message.payload in ("vision_activation", "vision_gradient"):
            return self._encoder_stage(message, message.source)
        microbatch = self._shares.microbatches[message.microbatch]
        if message.payload == "features":
            return list(self._features_in(microbatch, message.source))
        return self._gradients_in(microbatch)

    def _at_position(self, position: int) -> int:
        """The rank of this rank's own pipeline there."""
        place = self._place
        assert place is not None
        stage = position - self._topology.first_position
        return self._topology.language_rank(Coordinates(place.tensor, place.context, place.data, stage))

    def _encoder_stage(self, message: Message, position: int) -> list[int]:
        """The neighbouring stage of this rank's encoder; nobody when it has no image of the microbatch."""
        assert self._part is not None
        replica, _stage, tensor = self._part
        if not self._shares.microbatches[message.microbatch].images_of(replica.number):
            return []
        return [replica.ranks[position - replica.position][tensor]]

    def _features_out(self, microbatch: MicrobatchShares) -> list[Route]:
        assert self._part is not None
        replica, _stage, tensor = self._part
        keys = microbatch.images_of(replica.number)
        routes = []
        for data in sorted({key.data for key in keys}):
            rows = self._rows(microbatch, keys, set(microbatch.images_of(replica.number, data)))
            for peer in self._first_stages(data, lambda index: index % self._topology.vision_tensor == tensor):
                routes.append(Route(peer, rows))
        return routes

    def _features_in(self, microbatch: MicrobatchShares, position: int) -> Iterator[int]:
        place = self._place
        assert place is not None
        for replica in self._feeding(microbatch, place.data, position):
            yield replica.ranks[-1][place.tensor % self._topology.vision_tensor]

    def _gradients_out(self, microbatch: MicrobatchShares, position: int) -> Iterator[Route]:
        place = self._place
        assert place is not None
        keys = microbatch.images_in(place.data)
        for replica in self._feeding(microbatch, place.data, position):
            rows = self._rows(microbatch, keys, set(microbatch.images_of(replica.number, place.data)))
            for tensor in range(self._topology.vision_tensor):
                if tensor % self._topology.tensor == place.tensor:
                    yield Route(replica.ranks[-1][tensor], rows)

    def _gradients_in(self, microbatch: MicrobatchShares) -> list[int]:
        assert self._part is not None
        replica, _stage, tensor = self._part
        data_ranks = sorted({key.data for key in microbatch.images_of(replica.number)})
        sender = tensor % self._topology.tensor
        return [peer for data in data_ranks for peer in self._first_stages(data, lambda index: index == sender)]

    def _feeding(self, microbatch: MicrobatchShares, data: int, position: int) -> list[Replica]:
        """Encoders at a position that have images of a data rank's row."""
        return [
            replica
            for replica in self._topology.serving(data)
            if replica.last_position == position and microbatch.images_of(replica.number, data)
        ]

    def _first_stages(self, data: int, takes: Callable[[int], bool]) -> list[int]:
        """Ranks of a data rank's first stage, context rank by context rank, whose tensor rank is taken."""
        return [
            self._topology.language_rank(Coordinates(tensor, context, data, 0))
            for context in range(self._topology.context)
            for tensor in range(self._topology.tensor)
            if takes(tensor)
        ]

    def _rows(self, microbatch: MicrobatchShares, keys: list[ImageKey], wanted: set[ImageKey]) -> torch.Tensor | None:
        """Rows of some images in the features of `keys`; None: all rows."""
        parts, start = [], 0
        for key in keys:
            end = start + self._num_tokens_of(microbatch.grids[key])
            if key in wanted:
                parts.append(torch.arange(start, end))
            start = end
        return None if len(parts) == len(keys) else torch.cat(parts)


def feature_order(
    topology: Topology, microbatch: MicrobatchShares, data: int, num_tokens_of: Callable[[Grid], int]
) -> torch.Tensor | None:
    """How to put a row's features in order when they have come encoder by encoder; None: they are.

    Args:
        topology: of the run.
        microbatch: who encodes what.
        data: the data rank of the row.
        num_tokens_of: visual tokens of an image by its grid.

    Returns:
        int64 index of each visual token of the row in the parts, put together in the order in which they are taken:
        position by position, replica by replica.
    """
    arrived = [
        key
        for replica in sorted(topology.serving(data), key=lambda one: (one.last_position, one.number))
        for key in microbatch.images_of(replica.number, data)
    ]
    wanted = microbatch.images_in(data)
    if arrived == wanted:
        return None
    start, starts = 0, {}
    for key in arrived:
        starts[key] = start
        start += num_tokens_of(microbatch.grids[key])
    return torch.cat([torch.arange(starts[key], starts[key] + num_tokens_of(microbatch.grids[key])) for key in wanted])
