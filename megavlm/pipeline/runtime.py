"""Executes one rank's list of actions.

The runtime knows no model: a `Work` runs the pieces. Given the same pieces and the order of Megatron-Core's own
schedules, it does the same floating-point operations in the same order.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from megavlm.pipeline.actions import Compute, Message, Receive, Schedule, Send
from megavlm.pipeline.exchange import Exchange


class Work(Protocol):
    """The pieces of the model that a rank holds."""

    def run(self, compute: Compute, needs: Mapping[Message, torch.Tensor]) -> torch.Tensor | None:
        """Run one piece.

        Args:
            compute: which.
            needs: what it takes, by message.

        Returns:
            What it gives, to every message that it gives; None where it gives nothing.
        """


@dataclass(frozen=True)
class Event:
    """One executed action: seconds since the schedule began."""

    action: str
    start_s: float
    end_s: float


def execute(schedule: Schedule, rank: int, work: Work, exchange: Exchange, record: bool = False) -> list[Event]:
    """Run a rank's actions in order; returns when they are done and all messages have left.

    Args:
        schedule: deadlock-free (see `checks.violations`).
        rank: in the pipeline.
        work: runs the pieces.
        exchange: carries the messages.
        record: whether to keep the time of each action.

    Returns:
        Events, or nothing without `record`.

    Raises:
        RunError: a message did not come; names the action that waited.
    """
    here: dict[Message, torch.Tensor] = {}
    leaving: dict[Message, torch.Tensor] = {}
    events: list[Event] = []
    began = time.perf_counter()
    for action in schedule.actions[rank]:
        started = time.perf_counter()
        if isinstance(action, Receive):
            here[action.message] = exchange.receive(action.message)
        elif isinstance(action, Send):
            exchange.send(action.message, leaving.pop(action.message))
        else:
            _compute(schedule, rank, action, work, here, leaving)
        if record:
            events.append(Event(str(action), started - began, time.perf_counter() - began))
    exchange.finish()
    assert not here and not leaving, "a schedule left messages over"
    return events


def _compute(
    schedule: Schedule,
    rank: int,
    compute: Compute,
    work: Work,
    here: dict[Message, torch.Tensor],
    leaving: dict[Message, torch.Tensor],
) -> None:
    needs = {message: here.pop(message) for message in schedule.stage_map.needs(rank, compute)}
    result = work.run(compute, needs)
    for message in schedule.stage_map.gives(rank, compute):
        assert result is not None, f"{compute} gave nothing for {message}"
        target = here if message.is_local else leaving
        target[message] = result
