"""From a layout to the costs that a pipeline schedule is simulated with, and the schedule.

The language model's layers are split so that the largest stage is as small as it can be, the output layer and (on the
first stage) the encoder counted. The fullest data rank's microbatches are played: all the others wait for it.

Shape suffixes: R schedule positions, C chunks, M microbatches.
"""

import functools
import heapq
from dataclasses import dataclass

import numpy as np

from megavlm.config.schema import Recipe
from megavlm.pipeline.actions import Schedule
from megavlm.pipeline.bubble import QUICK_RULES, bubble
from megavlm.pipeline.costs import Link, StageCosts, stage_costs
from megavlm.pipeline.schedules import first_stage, spread, vision_stages
from megavlm.planner.hardware import Hardware
from megavlm.planner.layouts import Layout, tower_split
from megavlm.planner.timing import (
    EncoderModel,
    LanguageTimes,
    Trained,
    encode_seconds,
    encoder_model,
    fluid_shares,
    language_times,
    trained_of,
)
from megavlm.planner.workload import Batch, Cut, Workload


@dataclass(frozen=True)
class Problem:
    """What is planned for.

    Attributes:
        workload: a typical global batch.
        recipe: the knobs that are not searched.
        hardware: figures of the cluster.
        num_gpus: of the job.
    """

    workload: Workload
    recipe: Recipe
    hardware: Hardware
    num_gpus: int

    @functools.cached_property
    def trained(self) -> Trained:
        """What learns."""
        return trained_of(self.recipe)

    def batch(self, layout: Layout) -> Batch:
        """The global batch as a layout cuts it."""
        padding = 2 * layout.context if layout.context > 1 else 1
        multiple = layout.pipeline if layout.chunks > 1 and not layout.samples else 1
        return self.workload.cut(Cut(layout.data, layout.samples, layout.packing_length, multiple, padding))


@dataclass(frozen=True)
class Pieces:
    """What the costs of a layout are put together from; layouts that differ in the encoder's place share these."""

    batch: Batch
    language: LanguageTimes
    encoder: EncoderModel


def pieces_of(problem: Problem, layout: Layout) -> Pieces:
    """The pieces of a layout."""
    batch = problem.batch(layout)
    architecture = problem.workload.architecture
    language = language_times(architecture, problem.hardware, layout, batch.fullest, problem.trained)
    encoder = encoder_model(problem.workload, problem.hardware, layout, problem.trained)
    return Pieces(batch, language, encoder)


@dataclass(frozen=True)
class Played:
    """What is simulated of a layout.

    Attributes:
        costs: of the fullest data rank's pipeline.
        counts: decoder layers of each stage, in the order of the stages (chunk by chunk).
        encode_flops_RM: forward of the images that the rank with most of them at a position has, by microbatch.
    """

    costs: StageCosts
    counts: tuple[int, ...]
    encode_flops_RM: np.ndarray


def played(problem: Problem, layout: Layout, pieces: Pieces, counts: tuple[int, ...] | None = None) -> Played:
    """The costs of a layout's pipeline.

    Args:
        problem: what is planned for.
        layout: the layout.
        pieces: of the layout.
        counts: decoder layers of each stage; None: those of `layer_counts`.
    """
    first, num_positions = layout.topology.first_position, layout.topology.num_positions
    num_microbatches = pieces.batch.num_microbatches
    encode_RM = np.zeros((num_positions, num_microbatches))
    shares = fluid_shares(pieces.batch, layout, layout.pipeline)
    if layout.placement in ("spread", "bubble"):
        encode_RM[:] = shares
    else:
        parts = np.array(tower_split(layout, problem.workload.architecture), dtype=np.float64)
        parts = parts / parts.sum() if layout.placement == "stage" else np.ones(1)
        encode_RM[: len(parts)] = parts[:, None] * shares
    seconds_RM = encode_seconds(pieces.encoder, encode_RM)
    if counts is None:
        counts = layer_counts(problem, layout, pieces, seconds_RM[0] if layout.placement == "first_stage" else None)
    forward_RCM = np.zeros((num_positions, layout.chunks, num_microbatches))
    backward_RCM = np.zeros_like(forward_RCM)
    times = pieces.language
    for stage, count in enumerate(counts):
        chunk, rank = divmod(stage, layout.pipeline)
        is_last = stage == len(counts) - 1
        forward_RCM[first + rank, chunk] = count * times.layer_forward_M + is_last * times.head_forward_M
        backward_RCM[first + rank, chunk] = count * times.layer_backward_M + is_last * times.head_backward_M
    hardware, spanned = problem.hardware, layout.topology.layer_size + 1
    slots = 1 + problem.workload.architecture.num_deepstack
    costs = stage_costs(
        num_positions,
        layout.chunks,
        num_microbatches,
        forward_s=forward_RCM,
        backward_s=backward_RCM,
        encode_forward_s=seconds_RM,
        encode_backward_s=seconds_RM * pieces.encoder.backward_factor,
        activation_bytes=slots * times.activation_bytes_M,
        link=Link(hardware.bandwidth(spanned), hardware.latency_s(spanned)),
    )
    return Played(costs, counts, encode_RM)


def layer_counts(
    problem: Problem, layout: Layout, pieces: Pieces, encode_first_M: np.ndarray | None
) -> tuple[int, ...]:
    """Decoder layers of each stage: one after the other to the stage with the least work so far, the last one of these.

    What the first stages have more than others every microbatch waits for, while the last one has the output layer;
    with ties given to the first stages, steps are up to a tenth longer where the encoder fills the bubbles.

    Args:
        problem: has the number of layers.
        layout: has the number of stages.
        pieces: times.
        encode_first_M: forward of the encoder on the first stage, if it is there.
    """
    times, num_stages = pieces.language, layout.pipeline * layout.chunks
    layer_s = float((times.layer_forward_M + times.layer_backward_M).mean())
    loads = [0.0] * num_stages
    if encode_first_M is not None:
        # Each chunk of the first rank bears its part: the rank is what must not be too slow.
        whole = float(encode_first_M.mean()) * (1 + pieces.encoder.backward_factor) / layer_s
        for chunk in range(layout.chunks):
            loads[chunk * layout.pipeline] = whole / layout.chunks
    loads[-1] += float((times.head_forward_M + times.head_backward_M).mean()) / layer_s
    counts = [0] * num_stages
    # A stage in the middle may not be empty.
    for stage in range(1, num_stages - 1):
        counts[stage] = 1
    heap = [(counts[stage] + loads[stage], -stage) for stage in range(num_stages)]
    heapq.heapify(heap)
    for _ in range(problem.workload.architecture.language.num_layers - sum(counts)):
        load, minus_stage = heap[0]
        counts[-minus_stage] += 1
        heapq.heapreplace(heap, (load + 1, minus_stage))
    return tuple(counts)


def schedule_of(problem: Problem, layout: Layout, costs: StageCosts) -> Schedule:
    """The schedule that a run under this layout would execute."""
    num_microbatches, trains = costs.shape[2], problem.trained.encoder
    if layout.placement == "bubble":
        return bubble(
            layout.pipeline,
            num_microbatches,
            costs,
            max_live_encoder=layout.max_live,
            num_chunks=layout.chunks,
            train_encoder=trains,
            recompute=layout.encode_twice,
            extra_in_flight=layout.extra_in_flight,
            rules=QUICK_RULES,
        )
    return _fixed_schedule(layout, num_microbatches, trains)


@functools.lru_cache(maxsize=256)
def _fixed_schedule(layout: Layout, num_microbatches: int, trains: bool) -> Schedule:
    if layout.placement == "first_stage":
        return first_stage(layout.pipeline, num_microbatches, num_chunks=layout.chunks, train_encoder=trains)
    if layout.placement == "spread":
        return spread(
            layout.pipeline,
            num_microbatches,
            num_chunks=layout.chunks,
            train_encoder=trains,
            recompute=layout.encode_twice,
        )
    return vision_stages(layout.topology.first_position, layout.pipeline, num_microbatches, train_encoder=trains)


def least_makespan_s(layout: Layout, costs: StageCosts) -> float:
    """A lower bound of the pipeline's makespan, without playing it.

    No rank can do its work in less than its sum; and before a stage begins the ones in front of it run the first
    microbatch's forward, behind its end they run the last one's backward. In front of all that the first microbatch is
    encoded (with `spread`, the first rank's share of them all), and behind it the last one's encoder backward runs.
    """
    forward_RM, backward_RM = costs.encode_forward_s_RM, costs.encode_backward_s_RM
    language_R = (costs.forward_s_RCM + costs.backward_s_RCM).sum(axis=(1, 2))
    num_forwards = 2 if layout.encode_twice else 1
    work_R = language_R + num_forwards * forward_RM.sum(axis=1) + backward_RM.sum(axis=1)
    fill_R = costs.forward_s_RCM[:, 0, 0] + costs.backward_s_RCM[:, 0, -1]
    before_R = np.cumsum(fill_R) - fill_R
    bound_R = language_R + before_R
    if layout.placement in ("stage", "own_ranks"):  # encoder stages run one after the other
        bound_R = bound_R + forward_RM[:, 0].sum() + backward_RM[:, -1].sum()
    elif layout.placement == "first_stage":
        bound_R = np.maximum(bound_R, work_R + before_R)
        bound_R[1:] += forward_RM[0, 0] + backward_RM[0, -1]
    elif layout.placement == "spread":
        bound_R = bound_R + work_R[0] - language_R[0]
    else:
        bound_R = bound_R + forward_RM[:, 0].max() + backward_RM[:, -1].max()
    return float(max(bound_R.max(), work_R.max()))
