"""A pipeline schedule is data: for every pipeline rank the list of actions that it executes in order.

Three forms of action are enough for a runtime over point-to-point messages:

- `Compute`: run one piece of the model on one microbatch, from local tensors to local tensors.
- `Send`: start sending a message; returns at once, the tensor stays alive until the message has left.
- `Receive`: wait until a message is here.

What a piece needs and gives is not written into the list but follows from the `StageMap` (which rank holds which part
of the model): `StageMap.needs` and `StageMap.gives`. Everything that is needed from the own rank must stand earlier
in the list; everything that is needed from another rank must have been received. Messages on one channel (source,
destination, payload) are sent and received in the same order, so that a channel may be a communicator without tags.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["E", "EF", "EB", "F", "B"]
"""What a `Compute` does with its microbatch:

- `F`, `B`: forward and backward of the rank's language-model chunk.
- `EF`, `EB`: forward and backward of the rank's part of the vision encoder: of its share of the images, or, where the
  encoder's layers are split over ranks, of its layers. From `EF` to `EB` the encoder's activations are alive.
- `E`: encoder forward that keeps the features only. A frozen encoder needs no more. A trained one encodes again (`EF`,
  whose features are dropped) before its `EB`: that trades work for memory.
"""

Payload = Literal[
    "activation",  # language model, forward, from a stage to the next; DeepStack features travel beside it
    "gradient",  # language model, backward, from a stage to the one before
    "features",  # output of the encoder, to the first language-model stage
    "feature_gradient",  # back from there
    "vision_activation",  # between encoder stages, forward
    "vision_gradient",  # between encoder stages, backward
]


@dataclass(frozen=True, slots=True)
class Compute:
    """One piece of work; `chunk` is the rank's language-model chunk, 0 for the encoder."""

    kind: Kind
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")


@dataclass(frozen=True, slots=True)
class Message:
    """Identity of what one piece of work hands to another; it is sent only where source and destination differ.

    Attributes:
        payload: what it is.
        microbatch: of which microbatch.
        chunk: language-model chunk of the destination that takes it (0 for the encoder).
        source: pipeline rank that computes it.
        destination: pipeline rank that needs it.
    """

    payload: Payload
    microbatch: int
    chunk: int
    source: int
    destination: int

    @property
    def channel(self) -> tuple[int, int, Payload]:
        """Messages of one channel keep their order."""
        return self.source, self.destination, self.payload

    @property
    def is_local(self) -> bool:
        """Whether it stays on its rank."""
        return self.source == self.destination

    def __str__(self) -> str:
        chunk = f".{self.chunk}" if self.chunk else ""
        return f"{self.payload}{self.microbatch}{chunk} {self.source}>{self.destination}"


@dataclass(frozen=True, slots=True)
class Send:
    """Start sending; does not wait."""

    message: Message

    def __str__(self) -> str:
        return f"send({self.message})"


@dataclass(frozen=True, slots=True)
class Receive:
    """Wait for a message."""

    message: Message

    def __str__(self) -> str:
        return f"receive({self.message})"


Action = Compute | Send | Receive


@dataclass(frozen=True)
class EncoderPlace:
    """Where the vision encoder is.

    Attributes:
        ranks: pipeline ranks that hold (a part of) it.
        in_series: True: its layers are split over the ranks, every image passes through all of them in this order.
            False: every rank holds the whole encoder and encodes its share of every microbatch's images.
        is_trained: False: it runs no backward and keeps no activations.
    """

    ranks: tuple[int, ...]
    in_series: bool = False
    is_trained: bool = True

    def __post_init__(self) -> None:
        assert self.ranks and len(set(self.ranks)) == len(self.ranks), self.ranks


@dataclass(frozen=True)
class StageMap:
    """Which rank runs which part of the model, and what follows from it.

    Attributes:
        num_ranks: pipeline ranks.
        num_microbatches: microbatches of one optimizer step.
        stages: (rank, chunk) of the language model's stages, in the order of its layers. A rank may hold none.
        encoder: None: text only, or the encoder is counted as a part of the first stage.
        forward_only: nothing is differentiated (evaluation); the encoder is then not trained either.
    """

    num_ranks: int
    num_microbatches: int
    stages: tuple[tuple[int, int], ...]
    encoder: EncoderPlace | None = None
    forward_only: bool = False
    _position: dict[tuple[int, int], int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        position = {stage: index for index, stage in enumerate(self.stages)}
        assert self.stages and len(position) == len(self.stages), f"a stage stands twice in {self.stages}"
        assert not (self.forward_only and self.encoder and self.encoder.is_trained), "nothing is trained"
        ranks = {rank for rank, _ in self.stages} | set(self.encoder.ranks if self.encoder else ())
        assert ranks <= set(range(self.num_ranks)), (ranks, self.num_ranks)
        object.__setattr__(self, "_position", position)

    @property
    def num_chunks(self) -> int:
        """Most language-model chunks that a rank holds."""
        return 1 + max(chunk for _, chunk in self.stages)

    @property
    def first_rank(self) -> int:
        """Rank of the language model's first stage, which takes the features."""
        return self.stages[0][0]

    def computes(self, rank: int) -> list[Compute]:
        """All the work of a rank, without order; `E` only where the encoder is frozen."""
        language_kinds: tuple[Kind, ...] = ("F",) if self.forward_only else ("F", "B")
        work = [
            Compute(kind, microbatch, chunk)
            for owner, chunk in self.stages
            if owner == rank
            for kind in language_kinds
            for microbatch in range(self.num_microbatches)
        ]
        if self.encoder is not None and rank in self.encoder.ranks:
            kinds: tuple[Kind, ...] = ("EF", "EB") if self.encoder.is_trained else ("E",)
            work += [Compute(kind, microbatch) for kind in kinds for microbatch in range(self.num_microbatches)]
        return work

    def needs(self, rank: int, compute: Compute) -> list[Message]:
        """What must be on the rank before the work starts, local hand-overs included."""
        m, chunk = compute.microbatch, compute.chunk
        if compute.kind in ("E", "EF"):
            before = self._encoder_neighbour(rank, -1)
            return [] if before is None else [Message("vision_activation", m, 0, before, rank)]
        if compute.kind == "EB":
            after = self._encoder_neighbour(rank, +1)
            if after is None:
                return [Message("feature_gradient", m, 0, self.first_rank, rank)]
            return [Message("vision_gradient", m, 0, after, rank)]
        index = self._position[rank, chunk]
        if compute.kind == "F":
            if index == 0:
                return [Message("features", m, 0, source, rank) for source in self.feature_ranks]
            return [Message("activation", m, chunk, self.stages[index - 1][0], rank)]
        if index + 1 == len(self.stages):
            return []
        return [Message("gradient", m, chunk, self.stages[index + 1][0], rank)]

    def gives(self, rank: int, compute: Compute) -> list[Message]:
        """What the work hands on, local hand-overs included."""
        m = compute.microbatch
        if compute.kind in ("E", "EF"):
            after = self._encoder_neighbour(rank, +1)
            if after is None:
                return [Message("features", m, 0, rank, self.first_rank)]
            return [Message("vision_activation", m, 0, rank, after)]
        if compute.kind == "EB":
            before = self._encoder_neighbour(rank, -1)
            return [] if before is None else [Message("vision_gradient", m, 0, rank, before)]
        index = self._position[rank, compute.chunk]
        if compute.kind == "F":
            if index + 1 == len(self.stages):
                return []
            next_rank, next_chunk = self.stages[index + 1]
            return [Message("activation", m, next_chunk, rank, next_rank)]
        if index > 0:
            previous_rank, previous_chunk = self.stages[index - 1]
            return [Message("gradient", m, previous_chunk, rank, previous_rank)]
        if self.encoder is None or not self.encoder.is_trained:
            return []
        return [Message("feature_gradient", m, 0, rank, destination) for destination in self.feature_ranks]

    @property
    def feature_ranks(self) -> tuple[int, ...]:
        """Ranks that the features come from."""
        if self.encoder is None:
            return ()
        return self.encoder.ranks[-1:] if self.encoder.in_series else self.encoder.ranks

    def _encoder_neighbour(self, rank: int, step: int) -> int | None:
        """Rank of the encoder stage before or after this rank's; None at the end, and where shares are encoded."""
        assert self.encoder is not None and rank in self.encoder.ranks, f"rank {rank} holds no encoder"
        index = self.encoder.ranks.index(rank) + step
        if not self.encoder.in_series or not 0 <= index < len(self.encoder.ranks):
            return None
        return self.encoder.ranks[index]


@dataclass(frozen=True)
class Schedule:
    """What every pipeline rank does in one optimizer step.

    Attributes:
        placement: name of the encoder's place, or `text` without one; for reading only.
        stage_map: who holds what.
        actions: per rank, in order.
        max_live_encoder: bound on the microbatches of which a rank holds encoder activations; None: not bounded.
    """

    placement: str
    stage_map: StageMap
    actions: tuple[tuple[Action, ...], ...]
    max_live_encoder: int | None = None

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks."""
        return self.stage_map.num_ranks

    @property
    def num_microbatches(self) -> int:
        """Microbatches of one optimizer step."""
        return self.stage_map.num_microbatches

    @property
    def num_chunks(self) -> int:
        """Language-model chunks a rank."""
        return self.stage_map.num_chunks

    def computes(self, rank: int) -> tuple[Compute, ...]:
        """The rank's work in order, without the messages."""
        return tuple(action for action in self.actions[rank] if isinstance(action, Compute))

    def __str__(self) -> str:
        """One line a rank: the work in order; receives are `<`, sends `>`, both named by payload and peer."""
        head = f"{self.placement}: {self.num_ranks} ranks, {self.num_microbatches} microbatches"
        if self.num_chunks > 1:
            head += f", {self.num_chunks} chunks"
        if self.max_live_encoder is not None:
            head += f", encoder activations of at most {self.max_live_encoder} microbatches"
        lines = [f"{rank}: " + " ".join(_short(action) for action in row) for rank, row in enumerate(self.actions)]
        return "\n".join([head, *lines])


_SHORT_PAYLOAD: dict[Payload, str] = {
    "activation": "a",
    "gradient": "g",
    "features": "f",
    "feature_gradient": "fg",
    "vision_activation": "va",
    "vision_gradient": "vg",
}


def _short(action: Action) -> str:
    if isinstance(action, Compute):
        return str(action)
    message = action.message
    name = f"{_SHORT_PAYLOAD[message.payload]}{message.microbatch}" + (f".{message.chunk}" if message.chunk else "")
    return f"<{name}@{message.source}" if isinstance(action, Receive) else f">{name}@{message.destination}"


def assemble(
    placement: str, stage_map: StageMap, orders: Sequence[Iterable[Compute]], max_live_encoder: int | None = None
) -> Schedule:
    """Put the messages between the work: received right before it is needed, sent right after it is there.

    Args:
        placement: name of the encoder's place.
        stage_map: who holds what.
        orders: per rank the work in order. An `EF` behind the same microbatch's `E` sends nothing again.
        max_live_encoder: see `Schedule`.
    """
    assert len(orders) == stage_map.num_ranks
    rows = []
    for rank, order in enumerate(orders):
        row: list[Action] = []
        sent: set[Message] = set()
        for compute in order:
            row += [Receive(message) for message in stage_map.needs(rank, compute) if not message.is_local]
            row.append(compute)
            new = [message for message in stage_map.gives(rank, compute) if message not in sent]
            sent.update(new)
            row += [Send(message) for message in new if not message.is_local]
        rows.append(tuple(row))
    return Schedule(placement, stage_map, tuple(rows), max_live_encoder)
