"""Checkpoints of a running training: at most one is being written while it goes on."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megavlm.checkpoint.writing import PendingSave
from megavlm.train import resume
from megavlm.train.state import TrainState


class Saver:
    """Saves at once, or (`checkpoint.async_save`) begins to, and completes it between two later steps."""

    def __init__(self, state: TrainState, on_saved: Callable[[Path, float], None]) -> None:
        """Nothing is saved yet.

        Args:
            state: the run.
            on_saved: told the folder of every complete checkpoint, and for how many seconds training stood still.
        """
        self._state, self._on_saved = state, on_saved
        self._pending: PendingSave | None = None
        self._stall_s = 0.0

    def save(self) -> None:
        """Save the run as it stands; every rank calls this."""
        self.finish()
        started_s = time.perf_counter()
        asynchronous = self._state.recipe.checkpoint.async_save
        self._pending = resume.begin_save(self._state, copy=asynchronous)
        self._stall_s = time.perf_counter() - started_s
        if not asynchronous:
            self.finish()

    def poll(self) -> None:
        """Complete the save that is being written, when all ranks have written; every rank calls this after a step."""
        if self._pending is None:
            return
        ready = self._pending.is_written or self._pending.is_late
        all_ready = torch.tensor(int(ready), device=self._state.device)
        dist.all_reduce(all_ready, op=dist.ReduceOp.MIN)
        if all_ready:
            self.finish()

    def finish(self) -> None:
        """Wait for the save that is being written, if there is one; every rank calls this."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        started_s = time.perf_counter()
        folder = pending.finish()
        self._on_saved(folder, self._stall_s + time.perf_counter() - started_s)
