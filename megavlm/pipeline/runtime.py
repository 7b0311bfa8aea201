"""Executes one rank's list of actions.

The runtime knows no model: a `Work` runs the pieces. Given the same pieces and the order of Megatron-Core's own
schedules, it does the same floating-point operations in the same order.
"""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from megavlm.pipeline.actions import Action, Compute, Message, Receive, Schedule, Send
from megavlm.pipeline.exchange import Exchange

Needs = Mapping[Message, list[torch.Tensor]]
"""What a piece takes, by message: the parts of each, in the order of their senders."""


class Work(Protocol):
    """The pieces of the model that a rank holds."""

    def run(self, compute: Compute, needs: Needs) -> torch.Tensor | None:
        """Run one piece.

        Args:
            compute: which.
            needs: what it takes.

        Returns:
            What it gives, to every message that it gives; None where it gives nothing.
        """


@dataclass(frozen=True)
class Event:
    """One executed action: seconds since the schedule began."""

    action: Action
    start_s: float
    end_s: float


def execute(
    schedule: Schedule,
    position: int,
    work: Work,
    exchange: Exchange,
    clock: Callable[[], float] | None = None,
) -> list[Event]:
    """Run the actions of one list of a schedule; returns when they are done and all messages have left.

    Args:
        schedule: deadlock-free (see `checks.violations`).
        position: this rank's list.
        work: runs the pieces.
        exchange: carries the messages.
        clock: seconds; when given, the time of each action is kept. It must wait for the device to be at rest.

    Returns:
        Events, or nothing without `clock`.

    Raises:
        RunError: a message did not come; names the action that waited.
    """
    runner = _Runner(schedule, position, work, exchange, clock)
    for action in schedule.actions[position]:
        runner.run(action)
    exchange.finish()
    runner.check_nothing_is_left()
    return runner.events


class _Runner:
    def __init__(
        self,
        schedule: Schedule,
        position: int,
        work: Work,
        exchange: Exchange,
        clock: Callable[[], float] | None,
    ) -> None:
        self._stage_map, self._position = schedule.stage_map, position
        self._work, self._exchange, self._clock = work, exchange, clock
        self._here: dict[Message, list[torch.Tensor]] = {}
        self._leaving: dict[Message, torch.Tensor | None] = {}
        self._given: set[Message] = set()
        self._began_s = clock() if clock else 0.0
        self.events: list[Event] = []

    def run(self, action: Action) -> None:
        if isinstance(action, Receive):
            self._timed(action, lambda: self._receive(action.message))
        elif isinstance(action, Send):
            self._timed(action, lambda: self._exchange.send(action.message, self._leaving.pop(action.message)))
        else:
            self._compute(action)

    def _receive(self, message: Message) -> None:
        self._here[message] = self._exchange.receive(message)

    def _compute(self, compute: Compute) -> None:
        needed = self._stage_map.needs(self._position, compute)
        for message in needed:
            # Within a position too, ranks may hand parts to each other (shares of context ranks, of data ranks).
            if message.is_local:
                self._timed(Receive(message), functools.partial(self._receive, message))
        needs = {message: self._here.pop(message) for message in needed}
        result: list[torch.Tensor | None] = []
        self._timed(compute, lambda: result.append(self._work.run(compute, needs)))
        for message in self._stage_map.gives(self._position, compute):
            if message in self._given:  # an `EF` behind its `E`
                continue
            self._given.add(message)
            if message.is_local:
                self._exchange.send(message, result[0])
            else:
                self._leaving[message] = result[0]

    def _timed(self, action: Action, do: Callable[[], None]) -> None:
        if self._clock is None:
            do()
            return
        start_s = self._clock()
        do()
        self.events.append(Event(action, start_s - self._began_s, self._clock() - self._began_s))

    def check_nothing_is_left(self) -> None:
        assert not self._here and not self._leaving, "a schedule left messages over"


def perf_clock(synchronize: Callable[[], None]) -> Callable[[], float]:
    """A clock for `execute` that waits for the device first."""

    def now() -> float:
        synchronize()
        return time.perf_counter()

    return now
