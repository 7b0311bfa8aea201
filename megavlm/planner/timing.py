"""How long the pieces of a step take under a layout: the stated cost model.

- Matrix products and attention take their FLOPs over an assumed part of the peak; every layer's pass takes a fixed
  time beside it. A backward pass is twice the forward, plus what is computed again.
- Collectives of tensor, context and expert parallelism take volume over bandwidth and are not hidden; messages between
  stages take the link, not the ranks.
- Experts are chosen alike: every rank computes as many tokens as it has sent, one expert after the other, each with a
  fixed time.
- At the end of a step gradients are reduced and weights gathered over all copies, and the optimizer passes over its
  state at memory speed.

Nothing here was measured on a GPU; the figures serve to compare layouts with each other.

Shape suffixes: M microbatches.
"""

from dataclasses import dataclass

import numpy as np

from megavlm.config.schema import Recipe
from megavlm.config.tuning import tuning_plan
from megavlm.models.architecture import Architecture
from megavlm.planner.experts import ExpertRanks, sent_bytes
from megavlm.planner.flops import num_gated_layers
from megavlm.planner.hardware import Hardware
from megavlm.planner.layouts import Layout
from megavlm.planner.workload import Batch, Pack, Workload

ELEMENT_BYTES = 2
"""bf16: the presets' peaks are of bf16."""


@dataclass(frozen=True)
class Trained:
    """What learns.

    Attributes:
        tower: something in it does; adapters are taken for its own weights, an upper bound.
        connectors: something in them does.
        language: its own weights do, in some layer. Beside adapters it only passes gradients on; the adapters' own
            products are a percent of it.
    """

    tower: bool
    connectors: bool
    language: bool

    @property
    def encoder(self) -> bool:
        """Whether the encoder has a backward pass."""
        return self.tower or self.connectors


def trained_of(recipe: Recipe) -> Trained:
    """What a recipe trains."""
    plan = tuning_plan(recipe)
    own = any(rule.component == "language" and rule.tuning.method == "full" for rule in plan.rules)
    return Trained(plan.learns("vision"), plan.learns("projector"), own)


@dataclass(frozen=True)
class LanguageTimes:
    """Seconds of the language model on one rank, by microbatch.

    Attributes:
        layer_forward_M: one decoder layer.
        layer_backward_M: its backward, with what is computed again.
        head_forward_M: output layer and loss.
        head_backward_M: their backward.
        activation_bytes_M: one hidden state of a rank's tokens, without DeepStack features.
    """

    layer_forward_M: np.ndarray
    layer_backward_M: np.ndarray
    head_forward_M: np.ndarray
    head_backward_M: np.ndarray
    activation_bytes_M: np.ndarray


def language_times(
    architecture: Architecture, hardware: Hardware, layout: Layout, packs: tuple[Pack, ...], trained: Trained
) -> LanguageTimes:
    """Times of the language model's pieces."""
    language, ranks = architecture.language, layout.tensor * layout.context
    tokens_M = np.array([pack.num_tokens for pack in packs], dtype=np.float64)
    flops_M = np.array([pack.layer_flops for pack in packs])
    head_M = np.array([pack.head_flops for pack in packs])
    hidden_M = tokens_M / layout.context * language.hidden_size * ELEMENT_BYTES
    gather_M = _rings(hardware, hidden_M, layout.tensor, layout.tensor)
    # a layer that reads images has an attention and an MLP more; all of its heads have keys and values of their own
    gated = num_gated_layers(architecture) / language.num_layers
    channels = 2 * (language.num_query_groups + gated * language.num_attention_heads) * language.head_dim
    context_M = _rings(hardware, tokens_M * channels / layout.tensor * ELEMENT_BYTES, layout.context, ranks)
    mlp = _mlp_times(architecture, hardware, layout, tokens_M, gather_M)
    compute_M = flops_M / ranks / hardware.flops_per_s + (1 + gated) * hardware.layer_overhead_s + mlp.overhead_s
    forward_M = compute_M + (2 + 6 * gated) * gather_M + mlp.exchange_M + context_M
    # twice the work; with sequence parallelism the gathers of the linear layers' inputs are made again
    factor = 2 if trained.language else 1
    again_M = (1 + 4 * gated) * gather_M + mlp.gathered_again_M if trained.language else 0.0
    backward_M = factor * compute_M + (2 + 6 * gated) * gather_M + mlp.exchange_M + again_M + context_M
    if layout.recompute == "full":
        backward_M = backward_M + forward_M
    elif layout.recompute == "selective":
        backward_M = backward_M + mlp.compute_M + mlp.overhead_s + mlp.exchange_M
    head_forward_M = head_M / ranks / hardware.flops_per_s + hardware.layer_overhead_s + gather_M
    sequence = layout.tensor  # sequence parallel whenever tensor parallel
    return LanguageTimes(forward_M, backward_M, head_forward_M, factor * head_forward_M, hidden_M / sequence)


@dataclass(frozen=True)
class _MLPTimes:
    """Seconds of a layer's MLP, or of the experts in its place.

    Attributes:
        compute_M: its matrix products, which are part of the layer's.
        overhead_s: what experts take beside them.
        exchange_M: collectives of a forward, and of a backward.
        gathered_again_M: of the gather that a backward makes again.
    """

    compute_M: np.ndarray
    overhead_s: float
    exchange_M: np.ndarray
    gathered_again_M: np.ndarray


def _mlp_times(
    architecture: Architecture, hardware: Hardware, layout: Layout, tokens_M: np.ndarray, gather_M: np.ndarray
) -> _MLPTimes:
    language, ranks = architecture.language, layout.tensor * layout.context
    experts = language.experts
    a_token = 6 * language.hidden_size / ranks / hardware.flops_per_s
    if experts is None:
        return _MLPTimes(tokens_M * a_token * language.ffn_hidden_size, 0.0, 2 * gather_M, gather_M)
    shared = ExpertRanks(layout.expert, layout.expert_tensor, layout.dispatcher)
    among, within = sent_bytes(experts, shared, 1.0, language.hidden_size, ELEMENT_BYTES)
    spanned = layout.expert * layout.expert_tensor
    a_held_token = among / hardware.bandwidth(spanned) + within / hardware.bandwidth(layout.expert_tensor)
    # all messages of an all-to-all are on their way together, those of a gather one after the other
    latency_s = (layout.expert_tensor - 1) * hardware.latency_s(layout.expert_tensor)
    if layout.dispatcher == "allgather":
        latency_s = (spanned - 1) * hardware.latency_s(spanned)
    elif layout.expert > 1:
        latency_s += hardware.latency_s(spanned)
    return _MLPTimes(
        compute_M=tokens_M * a_token * experts.top_k * experts.ffn_hidden_size,
        overhead_s=experts.num_experts / layout.expert * hardware.expert_overhead_s,
        exchange_M=2 * (tokens_M / ranks * a_held_token + latency_s),
        gathered_again_M=np.zeros_like(tokens_M),
    )


def _rings(hardware: Hardware, bytes_M: np.ndarray, num_ranks: int, num_spanned: int) -> np.ndarray:
    """`Hardware.ring_s` of several tensors."""
    if num_ranks == 1:
        return np.zeros_like(bytes_M)
    share = (num_ranks - 1) / num_ranks / hardware.bandwidth(num_spanned)
    return bytes_M * share + (num_ranks - 1) * hardware.latency_s(num_spanned)


@dataclass(frozen=True)
class EncoderModel:
    """From an encoder's FLOPs on one microbatch to its time, on its tensor-parallel ranks.

    Attributes:
        forward_s_a_flop: seconds.
        backward_factor: of the backward over the forward, with what is computed again; 0: frozen.
        overhead_s: of a forward, if there is an image.
    """

    forward_s_a_flop: float
    backward_factor: float
    overhead_s: float


def encoder_model(workload: Workload, hardware: Hardware, layout: Layout, trained: Trained) -> EncoderModel:
    """Times of the encoder: collectives are spread over its FLOPs, as their volume is by patches."""
    vision, tensor = workload.architecture.vision, layout.vision_tensor
    flops, patches = workload.image_totals
    layers = vision.num_computed_layers
    a_flop = 1 / tensor / hardware.flops_per_s
    if tensor > 1 and flops:  # two all-reduces a layer
        volume = 4 * layers * patches * vision.hidden_size * ELEMENT_BYTES * (tensor - 1) / tensor
        a_flop += volume / hardware.bandwidth(tensor) / flops
    overhead_s = layers * (hardware.layer_overhead_s + 4 * (tensor - 1) * hardware.latency_s(tensor))
    backward = 0.0
    if trained.tower:
        backward = 2.0 + {"none": 0.0, "selective": 0.6, "full": 1.0}[layout.recompute]
    elif trained.connectors:
        backward = 0.1  # connectors are a few percent of a tower
    return EncoderModel(a_flop, backward, overhead_s)


@dataclass(frozen=True)
class StepEnd:
    """What follows the pipeline: seconds.

    Attributes:
        language_sync_s: gradients and weights of the language model.
        encoder_sync_s: of the encoder.
        optimizer_s: the update.
    """

    language_sync_s: float
    encoder_sync_s: float
    optimizer_s: float

    @property
    def total_s(self) -> float:
        """One after the other."""
        return self.language_sync_s + self.encoder_sync_s + self.optimizer_s


def sync_s(hardware: Hardware, num_trained: float, num_copies: int, num_spanned: int) -> float:
    """Reduce-scatter of fp32 gradients and all-gather of bf16 weights over the ranks with copies."""
    reduce = hardware.ring_s(4 * num_trained, num_copies, num_spanned)
    return reduce + hardware.ring_s(ELEMENT_BYTES * num_trained, num_copies, num_spanned)


def update_s(hardware: Hardware, num_trained: float) -> float:
    """AdamW on a rank's share: 4 bytes of gradient, 12 of state read and written, 2 of weights written."""
    return num_trained * (4 + 2 * 12 + 2) / (hardware.memory_bandwidth_bytes_per_s * hardware.bandwidth_efficiency)


def encode_seconds(model: EncoderModel, flops: np.ndarray) -> np.ndarray:
    """Forward times of shares with so many FLOPs."""
    return flops * model.forward_s_a_flop + np.where(flops > 0, model.overhead_s, 0.0)


def fluid_shares(batch: Batch, layout: Layout, num_positions: int) -> np.ndarray:
    """FLOPs of each microbatch's images that an encoder at each of the positions has, shared out evenly.

    An image is not divided: the largest one bounds the largest share. [positions, M]
    """
    at_a_position = layout.encoders_a_position
    own_M = np.array([sum(pack.image_flops) for pack in batch.fullest])
    largest_M = np.array([max(pack.image_flops, default=0.0) for pack in batch.fullest])
    if layout.placement == "first_stage" or layout.placement == "stage":
        return np.maximum(own_M / at_a_position, largest_M)[None]
    if layout.placement == "own_ranks":
        share_M = np.maximum(batch.round_image_flops_M / layout.vision_data, batch.largest_image_flops * (own_M > 0))
        return share_M[None]
    if layout.placement == "spread":
        num_encoders = at_a_position * num_positions * layout.data
        share_M = batch.round_image_flops_M / num_encoders
        total = share_M.sum()
        return np.tile(share_M * (max(1.0, batch.largest_image_flops / total) if total else 1.0), (num_positions, 1))
    return np.tile(own_M / (at_a_position * num_positions), (num_positions, 1))
