"""Messages between pipeline ranks over torch.distributed: sends that do not wait, receives that do.

Each payload has a process group of its own, so that messages of a channel (source, destination, payload) keep their
order and need no tags (NCCL has none). A message goes as a header with the tensor's shape, then the tensor: rows of
different microbatches differ in length.
"""

import datetime
from collections.abc import Mapping

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


def make_payload_groups(pipeline: dist.ProcessGroup, payloads: tuple[Payload, ...]) -> dict[Payload, dist.ProcessGroup]:
    """One group over the ranks of each pipeline for each payload; every rank of the world must call this.

    Args:
        pipeline: this rank's pipeline.
        payloads: those that the schedule sends.
    """
    everyones: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyones, dist.get_process_group_ranks(pipeline))
    pipelines = sorted({tuple(ranks) for ranks in everyones})
    groups: dict[Payload, dist.ProcessGroup] = {}
    for payload in payloads:
        for ranks in pipelines:
            group = dist.new_group(list(ranks))
            if dist.get_rank() in ranks:
                groups[payload] = group
    return groups


class Exchange:
    """Sends and receives the messages of one rank.

    Args:
        groups: per payload, from `make_payload_groups`.
        dtype: of all tensors.
        device: where received tensors are made.
        timeout_s: of one receive.
    """

    def __init__(
        self,
        groups: Mapping[Payload, dist.ProcessGroup],
        dtype: torch.dtype,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self._groups = groups
        self._dtype, self._device = dtype, device
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._on_the_way: list[tuple[dist.Work, torch.Tensor]] = []

    def send(self, message: Message, tensor: torch.Tensor) -> None:
        """Start sending; the tensor is kept until it has left."""
        assert tensor.dtype == self._dtype and tensor.dim() <= _MOST_DIMENSIONS
        group = self._groups[message.payload]
        header = torch.zeros(1 + _MOST_DIMENSIONS, dtype=torch.int64, device=self._device)
        header[: 1 + tensor.dim()] = torch.tensor([tensor.dim(), *tensor.shape])
        peer = dist.get_global_rank(group, message.destination)
        for part in (header, tensor.detach().contiguous()):
            request = dist.isend(part, peer, group=group)
            assert request is not None
            self._on_the_way.append((request, part))
        self._on_the_way = [(work, part) for work, part in self._on_the_way if not work.is_completed()]

    def receive(self, message: Message) -> torch.Tensor:
        """Wait for a message.

        Raises:
            RunError: it did not come in time, or the peer is gone; names the message.
        """
        group = self._groups[message.payload]
        peer = dist.get_global_rank(group, message.source)
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
                f"rank {dist.get_rank()} waited for receive({message}) and it did not come "
                f"within {self._timeout.total_seconds():.0f} s, or its sender is gone"
            ) from error

    def finish(self) -> None:
        """Wait until everything that was sent has left."""
        for request, _tensor in self._on_the_way:
            request.wait()
        self._on_the_way.clear()
