"""Whether a schedule can be executed and does all of the work: what is wrong, in words.

A runtime may execute every schedule for which `violations` is empty.
"""

from collections import Counter, deque
from dataclasses import dataclass

from megavlm.pipeline.actions import Action, Compute, Message, Receive, Schedule, Send


@dataclass(frozen=True)
class Waiting:
    """A rank that can never go on: the receive that it waits in, and where that stands in its list."""

    rank: int
    index: int
    action: Receive

    def __str__(self) -> str:
        return f"rank {self.rank} waits at action {self.index}: {self.action}"


def violations(schedule: Schedule) -> list[str]:
    """Everything that is wrong with a schedule; empty: it is complete, ordered, matched, bounded and never stops."""
    found: list[str] = []
    for rank in range(schedule.num_ranks):
        found += _completeness(schedule, rank)
        found += _order(schedule, rank)
        found += _microbatch_order(schedule, rank)
        found += _bound(schedule, rank)
    found += _messages(schedule)
    found += [str(waiting) for waiting in find_deadlock(schedule)]
    return found


def find_deadlock(schedule: Schedule) -> tuple[Waiting, ...]:
    """The ranks that never come to their end when sends do not wait and receives do; empty: none."""
    position = [0] * schedule.num_ranks
    sent: set[Message] = set()
    waiting_rank: dict[Message, int] = {}
    ready = deque(range(schedule.num_ranks))
    while ready:
        rank = ready.popleft()
        row = schedule.actions[rank]
        while position[rank] < len(row):
            action = row[position[rank]]
            if isinstance(action, Receive) and action.message not in sent:
                waiting_rank[action.message] = rank
                break
            if isinstance(action, Send):
                sent.add(action.message)
                if action.message in waiting_rank:
                    ready.append(waiting_rank.pop(action.message))
            position[rank] += 1
    stuck = []
    for rank, index in enumerate(position):
        if index < len(schedule.actions[rank]):
            action = schedule.actions[rank][index]
            assert isinstance(action, Receive)
            stuck.append(Waiting(rank, index, action))
    return tuple(stuck)


def max_live(schedule: Schedule, rank: int, start: str, end: str) -> int:
    """Most pieces of a rank's work that are between two kinds: `EF` to `EB`, or `F` to `B` (each chunk counts)."""
    live = most = 0
    for compute in schedule.computes(rank):
        live += (compute.kind == start) - (compute.kind == end)
        most = max(most, live)
    return most


def _completeness(schedule: Schedule, rank: int) -> list[str]:
    """Every piece of work once; an `E` may come before the `EF` of a trained encoder."""
    expected = Counter(schedule.stage_map.computes(rank))
    got = Counter(schedule.computes(rank))
    for compute, count in got.items():
        if compute.kind == "E" and count == 1 and Compute("EF", compute.microbatch) in expected:
            expected[compute] = 1
    missing = [f"rank {rank}: {compute} is missing" for compute in (expected - got)]
    return missing + [f"rank {rank}: {compute} is too much" for compute in (got - expected)]


def _order(schedule: Schedule, rank: int) -> list[str]:
    """Everything that a piece of work needs is there before it; nothing is sent before it is computed."""
    stage_map = schedule.stage_map
    known = set(stage_map.computes(rank))
    here: set[Message] = set()
    made: set[Message] = set()
    done: set[Compute] = set()
    found = []
    for index, action in enumerate(schedule.actions[rank]):
        if isinstance(action, Receive):
            here.add(action.message)
        elif isinstance(action, Send):
            if action.message not in made:
                found.append(f"rank {rank}, action {index}: {action} before it is computed")
        elif action in known or action.kind == "E":
            lacking = [str(message) for message in stage_map.needs(rank, action) if message not in here]
            forward = _forward_of(action)
            if forward is not None and forward not in done:
                lacking.append(str(forward))
            if action.kind == "E" and Compute("EF", action.microbatch) in done:
                found.append(f"rank {rank}, action {index}: {action} behind its EF")
            found += [f"rank {rank}, action {index}: {action} without {name}" for name in lacking]
            given = stage_map.gives(rank, action)
            made.update(given)
            here.update(message for message in given if message.is_local)
            done.add(action)
    return found


def _forward_of(compute: Compute) -> Compute | None:
    if compute.kind == "B":
        return Compute("F", compute.microbatch, compute.chunk)
    return Compute("EF", compute.microbatch) if compute.kind == "EB" else None


def _microbatch_order(schedule: Schedule, rank: int) -> list[str]:
    """Each kind of work takes the microbatches in their order, chunk by chunk: gradients add up in one order."""
    last: dict[tuple[str, int], int] = {}
    found = []
    for compute in schedule.computes(rank):
        line = compute.kind, compute.chunk
        if compute.microbatch <= last.get(line, -1):
            found.append(f"rank {rank}: {compute} behind microbatch {last[line]}")
        last[line] = compute.microbatch
    return found


def _bound(schedule: Schedule, rank: int) -> list[str]:
    most = max_live(schedule, rank, "EF", "EB")
    if schedule.max_live_encoder is None or most <= schedule.max_live_encoder:
        return []
    return [f"rank {rank}: encoder activations of {most} microbatches, the bound is {schedule.max_live_encoder}"]


def _messages(schedule: Schedule) -> list[str]:
    """Each message is sent once by its source, received once by its destination, in one order on its channel."""
    expected: set[Message] = set()
    for rank in range(schedule.num_ranks):
        for compute in schedule.stage_map.computes(rank):
            expected.update(message for message in schedule.stage_map.gives(rank, compute) if not message.is_local)
    found = []
    sent: dict[tuple, list[Message]] = {}
    received: dict[tuple, list[Message]] = {}
    for rank, row in enumerate(schedule.actions):
        for action in row:
            if isinstance(action, Compute):
                continue
            home, book = _home(action, sent, received)
            if home != rank:
                found.append(f"rank {rank}: {action} belongs to rank {home}")
            book.setdefault(action.message.channel, []).append(action.message)
    for name, book in (("sent", sent), ("received", received)):
        times = Counter(message for messages in book.values() for message in messages)
        found += [f"{message} is never {name}" for message in expected if not times[message]]
        found += [f"{message} is {name} {count} times" for message, count in times.items() if count > 1]
        found += [f"{message} is {name} but nobody needs it" for message in times if message not in expected]
    for channel, messages in sent.items():
        if received.get(channel, []) != messages:
            source, destination, payload = channel
            found.append(f"{payload} {source}>{destination}: received in another order than sent")
    return found


def _home(
    action: Action, sent: dict[tuple, list[Message]], received: dict[tuple, list[Message]]
) -> tuple[int, dict[tuple, list[Message]]]:
    """The rank that a message's action belongs to, and the book that it goes into."""
    assert not isinstance(action, Compute)
    if isinstance(action, Send):
        return action.message.source, sent
    return action.message.destination, received
