"""Mixtures of experts: where tokens go, what autograd keeps of them, and what it costs to send them.

Routing is taken to be balanced, as the load-balancing loss wants it; how far a run is from that, nobody knows before.
What is kept is that of Megatron-Core's router, dispatchers and experts one after the other (`models/experts.py`).

Letters in formulas: e bytes of an element, S tokens of the rank between the layers (its part of the row), E experts.
"""

from dataclasses import dataclass

from megavlm.models.architecture import ExpertsArchitecture
from megavlm.planner.tuned import LinearKept

FP32_BYTES = 4
INDEX_BYTES = 8


@dataclass(frozen=True)
class Routed:
    """Tokens of a microbatch at one rank's experts, a mean over layers.

    Attributes:
        arriving: tokens that its experts compute, each as often as it has chosen one of them.
        looked_at: tokens whose choices the rank looks through: with `allgather` those of all ranks that share experts.
    """

    arriving: float
    looked_at: float


@dataclass(frozen=True)
class ExpertRanks:
    """How the experts of a layer are shared out.

    Attributes:
        expert: ranks that have different experts.
        tensor: ranks that share the matrices of an expert.
        dispatcher: `alltoall` or `allgather`.
    """

    expert: int = 1
    tensor: int = 1
    dispatcher: str = "alltoall"

    def balanced(self, experts: ExpertsArchitecture, held_tokens: float) -> Routed:
        """Where all experts are chosen alike, and all ranks that share them have rows of one length."""
        gathers = self.dispatcher == "allgather"
        looked_at = held_tokens * (self.expert * self.tensor if gathers else 1)
        return Routed(held_tokens * experts.top_k * self.tensor, looked_at)


def kept_bytes(
    experts: ExpertsArchitecture,
    ranks: ExpertRanks,
    routed: Routed,
    held_tokens: float,
    hidden_size: int,
    element_bytes: int,
    learns: tuple[LinearKept, LinearKept],
    is_balanced: bool,
) -> float:
    """What router, dispatcher and experts keep in a layer, beside the layer's norm and its output.

    Args:
        experts: of a layer.
        ranks: that share them.
        routed: tokens.
        held_tokens: S.
        hidden_size: of the language model.
        element_bytes: e.
        learns: at an expert's first and second linear layer.
        is_balanced: whether there is a load-balancing loss.
    """
    e, arriving, (first, second) = element_bytes, routed.arriving, learns
    # the chosen numbers, and their softmax in fp32
    kept = held_tokens * experts.top_k * (INDEX_BYTES + FP32_BYTES)
    if is_balanced:  # the softmax over all experts, and which tokens count
        kept += held_tokens * (experts.num_experts * FP32_BYTES + 1)
    gathers = ranks.dispatcher == "allgather"
    # weights and choices of every expert, out of which the chosen ones are picked, and where they came from
    seen = experts.num_experts / (ranks.expert if gathers else 1)
    kept += routed.looked_at * seen * (e + 1)
    kept += INDEX_BYTES * (arriving if gathers else held_tokens * experts.top_k)
    # the first linear layer's input; its output, and what SwiGLU and the weight make of it
    inner = (2 + second.takes) * experts.ffn_hidden_size / ranks.tensor
    beside = first.low + first.gives + second.low + second.gives
    return kept + arriving * (first.takes * hidden_size + inner + 1 + beside) * e


def sent_bytes(
    experts: ExpertsArchitecture,
    ranks: ExpertRanks,
    held_tokens: float,
    hidden_size: int,
    element_bytes: int,
) -> tuple[float, float]:
    """Volume of a dispatch, or of a combination, of a rank: (over the ranks with other experts, over an expert's).

    `alltoall` sends a token to each of its experts, and the ranks that share an expert gather what came; `allgather`
    sends each token to every rank, in one collective.
    """
    token = held_tokens * hidden_size * element_bytes
    if ranks.dispatcher == "allgather":
        return token * (ranks.expert * ranks.tensor - 1), 0.0
    return (
        token * experts.top_k * (ranks.expert - 1) / ranks.expert,
        token * experts.top_k * (ranks.tensor - 1),
    )


def quicker_dispatcher(experts: ExpertsArchitecture, expert: int, tensor: int) -> str:
    """The dispatcher that sends less: tokens with many experts are better gathered on few ranks."""
    volumes = {
        kind: sum(sent_bytes(experts, ExpertRanks(expert, tensor, kind), 1.0, 1, 1))
        for kind in ("alltoall", "allgather")
    }
    return min(volumes, key=lambda kind: volumes[kind])
