"""Messages between ranks over torch.distributed: sends that do not wait, receives that do.

A schedule speaks of positions; `Routes` say which ranks a message goes to or comes from, and which rows of the tensor
each gets: one rank for hidden states, several for features that several ranks need, or that several encode.

Each payload has a process group of its own, so that messages of a channel (source, destination, payload) keep their
order and need no tags (NCCL has none). A message goes as a header with the tensor's shape, then the tensor: rows of
different microbatches differ in length.
"""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from megavlm.errors import RunError
from megavlm.pipeline.actions import Message, Payload

PAYLOADS: tuple[Payload, ...] = (
    "activation",
    "gradient",
    "features",
    "feature_gradient",
    "vision_activation",
    "vision_gradient",
)
_MOST_DIMENSIONS = 7


@dataclass(frozen=True)
class Route:
    """One receiver of a message: a global rank, and the rows (of dimension 0) that it gets; None: all."""

    peer: int
    rows: torch.Tensor | None = None


class Routes(Protocol):
    """From the positions of a schedule to ranks, as one rank sees it. Both sides of a message agree."""

    def outgoing(self, message: Message) -> Sequence[Route]:
        """Who gets what of a message that this rank gives; nobody where there is nothing to give."""

    def incoming(self, message: Message) -> Sequence[int]:
        """Global ranks that parts of a message come from, in the order in which the parts are taken."""


def make_payload_groups(payloads: Sequence[Payload] = PAYLOADS) -> dict[Payload, dist.ProcessGroup]:
    """One group over all ranks for each payload; every rank of the world must call this. Empty for a world of one."""
    if dist.get_world_size() == 1:
        return {}
    ranks = list(range(dist.get_world_size()))
    return {payload: dist.new_group(ranks) for payload in payloads}


class Exchange:
    """Sends and receives the messages of one rank during one run through a schedule.

    Args:
        groups: per payload, from `make_payload_groups`.
        routes: who sends what to whom.
        dtype: of all tensors.
        device: where received tensors are made.
        timeout_s: of one receive.
    """

    def __init__(
        self,
        groups: Mapping[Payload, dist.ProcessGroup],
        routes: Routes,
        dtype: torch.dtype,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self._groups, self._routes = groups, routes
        self._dtype, self._device = dtype, device
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._rank = dist.get_rank()
        self._on_the_way: list[tuple[dist.Work, torch.Tensor]] = []
        self._own: dict[Message, torch.Tensor] = {}

    def send(self, message: Message, tensor: torch.Tensor | None) -> None:
        """Start sending to everybody who gets a part; what is sent is kept until it has left.

        Args:
            message: which.
            tensor: None where nobody gets anything.
        """
        for route in self._routes.outgoing(message):
            assert tensor is not None, f"nothing to send for {message}"
            part = tensor.detach()
            if route.rows is not None:
                part = part.index_select(0, route.rows.to(part.device))
            if route.peer == self._rank:
                self._own[message] = part
            else:
                self._send(message.payload, route.peer, part)
        self._on_the_way = [(work, part) for work, part in self._on_the_way if not work.is_completed()]

    def _send(self, payload: Payload, peer: int, part: torch.Tensor) -> None:
        assert part.dtype == self._dtype and part.dim() <= _MOST_DIMENSIONS, (part.dtype, part.shape)
        header = torch.zeros(1 + _MOST_DIMENSIONS, dtype=torch.int64, device=self._device)
        header[: 1 + part.dim()] = torch.tensor([part.dim(), *part.shape])
        for tensor in (header, part.contiguous()):
            request = dist.isend(tensor, peer, group=self._groups[payload])
            assert request is not None
            self._on_the_way.append((request, tensor))

    def receive(self, message: Message) -> list[torch.Tensor]:
        """Wait for all parts of a message.

        Raises:
            RunError: one did not come in time, or its sender is gone; names the message.
        """
        parts = []
        for peer in self._routes.incoming(message):
            parts.append(self._own.pop(message) if peer == self._rank else self._receive(message, peer))
        return parts

    def _receive(self, message: Message, peer: int) -> torch.Tensor:
        group = self._groups[message.payload]
        header = torch.zeros(1 + _MOST_DIMENSIONS, dtype=torch.int64, device=self._device)
        self._wait(header, peer, group, message)
        num_dimensions, *shape = header.tolist()
        tensor = torch.empty(shape[:num_dimensions], dtype=self._dtype, device=self._device)
        self._wait(tensor, peer, group, message)
        return tensor

    def _wait(self, buffer: torch.Tensor, peer: int, group: dist.ProcessGroup, message: Message) -> None:
        try:
            request = dist.irecv(buffer, peer, group=group)
            assert request is not None
            request.wait(self._timeout)
        except RuntimeError as error:
            raise RunError(
                f"rank {self._rank} waited for receive({message}) from rank {peer} and it did not come "
                f"within {self._timeout.total_seconds():.0f} s, or its sender is gone"
            ) from error

    def finish(self) -> None:
        """Wait until everything that was sent has left."""
        for request, _tensor in self._on_the_way:
            request.wait()
        self._on_the_way.clear()
        assert not self._own, "a part that this rank gave itself was not taken"
