"""From a recipe's layout and a step's costs to the schedule that is executed.

Shape suffixes: R schedule positions, C language-model chunks, M microbatches.
"""

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np

from megavlm.config.schema import ParallelConfig
from megavlm.parallel.topology import Topology
from megavlm.pipeline.actions import EncoderPlace, Schedule, StageMap
from megavlm.pipeline.bubble import QUICK_RULES, bubble
from megavlm.pipeline.costs import StageCosts, stage_costs
from megavlm.pipeline.schedules import first_stage, forward_pass, language_stages, spread, vision_stages
from megavlm.train.inputs import CostModel, StepInputs


@dataclass(frozen=True)
class Layout:
    """What a schedule depends on beside the costs.

    Attributes:
        topology: of the run.
        num_chunks: language-model chunks of a rank.
        trains_encoder: whether the encoder has a backward pass.
        recompute: see `vision_recompute` of the recipe.
        max_live: see `vision_max_live_microbatches` of the recipe, its default filled in.
        extra_in_flight: see `vision_extra_microbatches_in_flight` of the recipe.
    """

    topology: Topology
    num_chunks: int
    trains_encoder: bool
    recompute: bool
    max_live: int
    extra_in_flight: int


def layout_of(parallel: ParallelConfig, topology: Topology, trains_encoder: bool) -> Layout:
    """The layout of a recipe."""
    return Layout(
        topology=topology,
        num_chunks=parallel.virtual_pipeline_model_parallel_size,
        trains_encoder=trains_encoder,
        recompute=parallel.vision_recompute and trains_encoder,
        max_live=parallel.vision_max_live_microbatches or topology.pipeline + 4,
        extra_in_flight=parallel.vision_extra_microbatches_in_flight,
    )


def training_schedule(layout: Layout, inputs: StepInputs, costs: CostModel) -> Schedule:
    """The schedule of an optimizer step.

    Raises:
        UseError: the bound on live encoder activations cannot be held, or the microbatches do not divide.
    """
    num_microbatches = len(inputs.orders)
    if layout.topology.placement != "bubble":
        return _fixed_schedule(layout, num_microbatches)
    return bubble(
        layout.topology.num_positions,
        num_microbatches,
        step_costs(layout, inputs, costs),
        max_live_encoder=layout.max_live,
        num_chunks=layout.num_chunks,
        train_encoder=layout.trains_encoder,
        recompute=layout.recompute,
        extra_in_flight=layout.extra_in_flight,
        rules=QUICK_RULES,
    )


@functools.lru_cache(maxsize=16)
def _fixed_schedule(layout: Layout, num_microbatches: int) -> Schedule:
    """Those that depend on the layout and the number of microbatches alone."""
    topology, train = layout.topology, layout.trains_encoder
    if topology.placement == "first_stage":
        return first_stage(topology.pipeline, num_microbatches, num_chunks=layout.num_chunks, train_encoder=train)
    if topology.placement == "spread":
        return spread(
            topology.pipeline,
            num_microbatches,
            num_chunks=layout.num_chunks,
            train_encoder=train,
            recompute=layout.recompute,
        )
    schedule = vision_stages(topology.first_position, topology.pipeline, num_microbatches, train_encoder=train)
    return dataclasses.replace(schedule, placement=topology.placement)


@functools.lru_cache(maxsize=16)
def evaluation_schedule(layout: Layout, num_microbatches: int) -> Schedule:
    """Forwards only."""
    topology = layout.topology
    if topology.first_position:
        encoder = EncoderPlace(tuple(range(topology.first_position)), in_series=True, is_trained=False)
        stages = tuple((position, 0) for position in range(topology.first_position, topology.num_positions))
        return forward_pass(StageMap(topology.num_positions, num_microbatches, stages, encoder))
    everywhere = topology.placement in ("spread", "bubble")
    encoder = EncoderPlace(tuple(range(topology.pipeline)) if everywhere else (0,), is_trained=False)
    return forward_pass(language_stages(topology.pipeline, layout.num_chunks, num_microbatches, encoder))


def step_costs(layout: Layout, inputs: StepInputs, costs: CostModel) -> StageCosts:
    """Costs of a step's work, in exact FLOPs of a rank; messages cost nothing.

    The slowest of the ranks of a position counts: they wait for each other.
    """
    topology = layout.topology
    num_microbatches = len(inputs.orders)
    forward_RCM = np.zeros((topology.num_positions, layout.num_chunks, num_microbatches))
    for stage in range(topology.pipeline):
        for chunk in range(layout.num_chunks):
            forward_RCM[topology.first_position + stage, chunk] = [
                costs.decode(stage, chunk, lengths, grids) / (topology.tensor * topology.context)
                for lengths, grids in zip(inputs.lengths, inputs.grids, strict=True)
            ]
    encode_RM = np.zeros((topology.num_positions, num_microbatches))
    for replica in topology.replicas:
        share_M = inputs.shares.costs_of(replica.number, costs.encode)
        for position in range(replica.position, replica.last_position + 1):
            part_M = np.array(share_M) / (topology.vision_tensor * topology.vision_stages)
            encode_RM[position] = np.maximum(encode_RM[position], part_M)
    return stage_costs(
        *forward_RCM.shape,
        forward_s=forward_RCM,
        backward_s=2 * forward_RCM,
        encode_forward_s=encode_RM,
        encode_backward_s=2 * encode_RM if layout.trains_encoder else 0.0,
        encoder_live_bytes=encode_RM,
    )
