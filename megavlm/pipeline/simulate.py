"""Plays a schedule with given costs: when everything happens, who waits for what, how much is alive.

Each rank executes its list in order. A send takes no time of the rank; its message occupies the link from source to
destination behind the messages sent there before, and arrives a latency later. A receive waits until then.
"""

from collections import deque
from dataclasses import dataclass
from typing import Literal

from megavlm.errors import RunError
from megavlm.pipeline.actions import Action, Compute, Message, Payload, Receive, Schedule, Send
from megavlm.pipeline.checks import find_deadlock
from megavlm.pipeline.costs import StageCosts

Cause = Literal["activation", "gradient", "features", "encode", "drained"]
"""Why a rank is idle: the language model waits for an activation, a gradient or the encoder's features; the encoder
waits for its input or its gradient; the rank has done its part."""

CAUSES: tuple[Cause, ...] = ("activation", "gradient", "features", "encode", "drained")

_CAUSE_OF: dict[Payload, Cause] = {
    "activation": "activation",
    "gradient": "gradient",
    "features": "features",
    "feature_gradient": "encode",
    "vision_activation": "encode",
    "vision_gradient": "encode",
}


@dataclass(frozen=True, slots=True)
class Event:
    """Something that took time on a rank: work, or a receive that had to wait."""

    rank: int
    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True)
class PeakLive:
    """Most activations that a rank holds at once.

    Attributes:
        llm_microbatches: language model, a microbatch counted once for each chunk.
        llm_bytes: of these; the peak of the bytes may be at another time than that of the number.
        encoder_microbatches: microbatches of which encoder activations are alive.
        encoder_bytes: of these.
    """

    llm_microbatches: int
    llm_bytes: float
    encoder_microbatches: int
    encoder_bytes: float


@dataclass(frozen=True)
class Simulation:
    """How a schedule went.

    Attributes:
        makespan_s: until the last rank has finished.
        busy_s: per rank, the time of its work.
        idle_s: per rank, by cause; with `busy_s` it adds up to the makespan.
        peak_live: per rank.
        events: by rank, then by time.
    """

    makespan_s: float
    busy_s: tuple[float, ...]
    idle_s: tuple[dict[Cause, float], ...]
    peak_live: tuple[PeakLive, ...]
    events: tuple[Event, ...]

    @property
    def bubble(self) -> float:
        """Idle time of all ranks over their work: (p-1)/m for 1F1B with equal stages."""
        return len(self.busy_s) * self.makespan_s / sum(self.busy_s) - 1


def simulate(schedule: Schedule, costs: StageCosts) -> Simulation:
    """Play a schedule.

    Args:
        schedule: any; it is not checked beyond what playing it needs (see `checks.violations`).
        costs: of the same ranks, chunks and microbatches.

    Raises:
        RunError: the schedule never ends; the message names every action that waits.
    """
    shape = (schedule.num_ranks, schedule.num_chunks, schedule.num_microbatches)
    assert costs.shape == shape, f"costs of shape {costs.shape} for a schedule of shape {shape}"
    player = _Player(schedule, costs)
    player.play()
    makespan_s = max(player.clock_s)
    work = [[event for event in row if isinstance(event.action, Compute)] for row in player.events]
    return Simulation(
        makespan_s=makespan_s,
        busy_s=tuple(sum(event.end_s - event.start_s for event in row) for row in work),
        idle_s=tuple(
            _idle(row, makespan_s - clock_s) for row, clock_s in zip(player.events, player.clock_s, strict=True)
        ),
        peak_live=tuple(_peak_live(schedule.computes(rank), rank, costs) for rank in range(schedule.num_ranks)),
        events=tuple(event for row in player.events for event in row),
    )


class _Player:
    """Advances each rank as far as the messages allow, until all are at their end.

    Every time follows from the lists alone, whichever rank is advanced first.
    """

    def __init__(self, schedule: Schedule, costs: StageCosts) -> None:
        self.schedule = schedule
        self.costs = costs
        self.clock_s = [0.0] * schedule.num_ranks
        self.events: list[list[Event]] = [[] for _ in range(schedule.num_ranks)]
        self._position = [0] * schedule.num_ranks
        self._arrival_s: dict[Message, float] = {}
        self._link_free_s: dict[tuple[int, int], float] = {}
        self._waiting_rank: dict[Message, int] = {}

    def play(self) -> None:
        """To the end.

        Raises:
            RunError: see `simulate`.
        """
        self._ready = deque(range(self.schedule.num_ranks))
        while self._ready:
            self._advance(self._ready.popleft())
        stuck = find_deadlock(self.schedule)
        if stuck:
            raise RunError("the schedule never ends: " + "; ".join(str(waiting) for waiting in stuck))

    def _advance(self, rank: int) -> None:
        row, events = self.schedule.actions[rank], self.events[rank]
        now = self.clock_s[rank]
        position = self._position[rank]
        while position < len(row):
            action = row[position]
            if isinstance(action, Compute):
                end = now + self.costs.time_s(rank, action)
                events.append(Event(rank, action, now, end))
                now = end
            elif isinstance(action, Send):
                self._send(action.message, now)
            else:
                arrival = self._arrival_s.get(action.message)
                if arrival is None:
                    self._waiting_rank[action.message] = rank
                    break
                if arrival > now:
                    events.append(Event(rank, action, now, arrival))
                    now = arrival
            position += 1
        self._position[rank], self.clock_s[rank] = position, now

    def _send(self, message: Message, now: float) -> None:
        link = self.costs.link
        direction = message.source, message.destination
        start = max(now, self._link_free_s.get(direction, 0.0))
        free = start + self.costs.message_bytes(message) / link.bandwidth_bytes_per_s
        self._link_free_s[direction] = free
        self._arrival_s[message] = free + link.latency_s
        if message in self._waiting_rank:
            self._ready.append(self._waiting_rank.pop(message))


def _idle(events: list[Event], drained_s: float) -> dict[Cause, float]:
    idle: dict[Cause, float] = dict.fromkeys(CAUSES, 0.0)
    for event in events:
        if isinstance(event.action, Receive):
            idle[_CAUSE_OF[event.action.message.payload]] += event.end_s - event.start_s
    idle["drained"] = drained_s
    return idle


def _peak_live(order: tuple[Compute, ...], rank: int, costs: StageCosts) -> PeakLive:
    """Follows from the order alone: a rank does one thing at a time."""
    llm, encoder = _Live(), _Live()
    for compute in order:
        if compute.kind in ("F", "B"):
            size = float(costs.llm_live_bytes_RCM[rank, compute.chunk, compute.microbatch])
            llm.add(1 if compute.kind == "F" else -1, size)
        elif compute.kind in ("EF", "EB"):
            size = float(costs.encoder_live_bytes_RM[rank, compute.microbatch])
            encoder.add(1 if compute.kind == "EF" else -1, size)
    return PeakLive(llm.peak_number, llm.peak_bytes, encoder.peak_number, encoder.peak_bytes)


class _Live:
    """Counts what is alive, and remembers the most."""

    def __init__(self) -> None:
        self.number = self.peak_number = 0
        self.bytes = self.peak_bytes = 0.0

    def add(self, sign: int, size: float) -> None:
        self.number += sign
        self.bytes += sign * size
        self.peak_number = max(self.peak_number, self.number)
        self.peak_bytes = max(self.peak_bytes, self.bytes)
