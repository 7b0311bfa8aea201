"""What the work and the messages of one optimizer step cost.

Shape suffixes: R pipeline ranks, C language-model chunks of a rank, M microbatches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megavlm.pipeline.actions import Compute, Message, Payload

Values = float | Sequence[float] | Sequence[Sequence[float]] | np.ndarray


@dataclass(frozen=True)
class Link:
    """Connection between two pipeline ranks, each direction of each pair for itself.

    Attributes:
        bandwidth_bytes_per_s: of one direction; messages of one direction follow each other.
        latency_s: added to every message; it does not occupy the link.
    """

    bandwidth_bytes_per_s: float = math.inf
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        assert self.bandwidth_bytes_per_s > 0 and self.latency_s >= 0, self


@dataclass(frozen=True, eq=False)
class StageCosts:
    """Costs of every piece of work and message. Build it with `stage_costs`.

    Times are seconds; any other unit (FLOPs) does as well, if the link's figures are in the same.

    Attributes:
        forward_s_RCM: language-model forward of a rank's chunk on a microbatch.
        backward_s_RCM: its backward.
        encode_forward_s_RM: encoder forward of the rank's share (or layers) on a microbatch, with or without keeping
            activations.
        encode_backward_s_RM: its backward.
        activation_bytes_M: hidden state that passes from a stage to the next; its gradient is as large.
        feature_bytes_RM: what the rank hands on of a microbatch's features (or, between encoder stages, hidden state).
        llm_live_bytes_RCM: activations alive from a forward to its backward.
        encoder_live_bytes_RM: the same of the encoder.
        link: between any two ranks.
    """

    forward_s_RCM: np.ndarray
    backward_s_RCM: np.ndarray
    encode_forward_s_RM: np.ndarray
    encode_backward_s_RM: np.ndarray
    activation_bytes_M: np.ndarray
    feature_bytes_RM: np.ndarray
    llm_live_bytes_RCM: np.ndarray
    encoder_live_bytes_RM: np.ndarray
    link: Link

    @property
    def shape(self) -> tuple[int, int, int]:
        """(R, C, M)."""
        num_ranks, num_chunks, num_microbatches = self.forward_s_RCM.shape
        return num_ranks, num_chunks, num_microbatches

    def time_s(self, rank: int, compute: Compute) -> float:
        """Duration of a piece of work."""
        if compute.kind == "F":
            return float(self.forward_s_RCM[rank, compute.chunk, compute.microbatch])
        if compute.kind == "B":
            return float(self.backward_s_RCM[rank, compute.chunk, compute.microbatch])
        table = self.encode_backward_s_RM if compute.kind == "EB" else self.encode_forward_s_RM
        return float(table[rank, compute.microbatch])

    def message_bytes(self, message: Message) -> float:
        """Size of a message."""
        if message.payload in ("activation", "gradient"):
            return float(self.activation_bytes_M[message.microbatch])
        encoder_rank = message.source if message.payload in _FORWARD_FROM_ENCODER else message.destination
        return float(self.feature_bytes_RM[encoder_rank, message.microbatch])

    @property
    def work_s(self) -> float:
        """All the work of all ranks, nothing encoded twice; divided by the ranks it is a lower bound of the step."""
        trained = self.forward_s_RCM.sum() + self.backward_s_RCM.sum()
        return float(trained + self.encode_forward_s_RM.sum() + self.encode_backward_s_RM.sum())


_FORWARD_FROM_ENCODER: tuple[Payload, ...] = ("features", "vision_activation")


def stage_costs(
    num_ranks: int,
    num_chunks: int,
    num_microbatches: int,
    *,
    forward_s: Values = 1.0,
    backward_s: Values = 2.0,
    encode_forward_s: Values = 0.0,
    encode_backward_s: Values = 0.0,
    activation_bytes: Values = 0.0,
    feature_bytes: Values = 0.0,
    llm_live_bytes: Values = 0.0,
    encoder_live_bytes: Values = 0.0,
    link: Link | None = None,
) -> StageCosts:
    """Costs from numbers or arrays that broadcast to [R, C, M] (language model), [R, M] (encoder) or [M] (activations).

    Args:
        num_ranks: R.
        num_chunks: C.
        num_microbatches: M.
        forward_s: see `StageCosts` for this and the others.
        backward_s: time.
        encode_forward_s: time.
        encode_backward_s: time.
        activation_bytes: message.
        feature_bytes: message.
        llm_live_bytes: memory.
        encoder_live_bytes: memory.
        link: None: messages cost nothing.
    """
    language = (num_ranks, num_chunks, num_microbatches)
    encoder = (num_ranks, num_microbatches)
    return StageCosts(
        forward_s_RCM=_filled("forward_s", forward_s, language),
        backward_s_RCM=_filled("backward_s", backward_s, language),
        encode_forward_s_RM=_filled("encode_forward_s", encode_forward_s, encoder),
        encode_backward_s_RM=_filled("encode_backward_s", encode_backward_s, encoder),
        activation_bytes_M=_filled("activation_bytes", activation_bytes, (num_microbatches,)),
        feature_bytes_RM=_filled("feature_bytes", feature_bytes, encoder),
        llm_live_bytes_RCM=_filled("llm_live_bytes", llm_live_bytes, language),
        encoder_live_bytes_RM=_filled("encoder_live_bytes", encoder_live_bytes, encoder),
        link=link or Link(),
    )


def _filled(name: str, values: Values, shape: tuple[int, ...]) -> np.ndarray:
    """A read-only float64 array of the shape."""
    filled = np.array(np.broadcast_to(np.asarray(values, dtype=np.float64), shape))
    assert np.isfinite(filled).all() and (filled >= 0).all(), f"{name} has a value that is negative or not finite"
    filled.flags.writeable = False
    return filled
