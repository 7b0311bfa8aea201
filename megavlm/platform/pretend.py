"""A rank of a world that is not there, and modules that are not there either: for checking layouts without machines."""

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

import torch
import torch.distributed as dist

META = torch.device("meta")


@contextlib.contextmanager
def pretended_rank(rank: int, world_size: int) -> Iterator[None]:
    """Be a rank of a world of so many, whose process groups do nothing (torch's `fake` backend)."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Make tensors without memory, also where Megatron-Core asks for the current CUDA device by name."""
    with patch.object(torch.cuda, "current_device", lambda: META), META:
        yield
