"""A pass of packed rows through the pipeline: by a schedule, with or without gradients."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megavlm.pipeline.actions import Schedule
from megavlm.pipeline.exchange import Exchange
from megavlm.pipeline.runtime import Event, execute, perf_clock
from megavlm.train.pipeline_work import OnOutput, PartsWork, Rows
from megavlm.train.routes import LayoutRoutes
from megavlm.train.state import TrainState


def run_schedule(
    state: TrainState, schedule: Schedule, rows: Rows, on_output: OnOutput, record: bool = False
) -> tuple[list[Any], list[Event]]:
    """Drive all microbatches through a schedule; gradients, where there are any, stay unreduced.

    Args:
        state: the run.
        schedule: for this layout and number of microbatches.
        rows: what this rank needs of the microbatches.
        on_output: on the last stage, (logits, batch) to (sum, count, anything); the sum is what is differentiated.
        record: whether to keep the time of each action.

    Returns:
        The third results, on the last stage, and the events.
    """
    num_tokens_of = state.directory.architecture.inputs.num_image_tokens
    routes = LayoutRoutes(state.groups.topology, state.parts.rank, rows.shares, num_tokens_of)
    exchange = Exchange(
        state.payload_groups,
        routes,
        state.parts.config.params_dtype,
        state.device,
        state.recipe.train.distributed_timeout_s,
    )
    work = PartsWork(state.parts, rows, on_output, num_tokens_of)
    clock = perf_clock(torch.cuda.synchronize) if record else None
    if record:
        dist.barrier()
    with torch.set_grad_enabled(not schedule.stage_map.forward_only):
        events = execute(schedule, state.groups.position, work, exchange, clock)
    return work.results, events


@contextlib.contextmanager
def not_training(state: TrainState) -> Iterator[None]:
    """Without dropout, whether it is a step's or an evaluation's pass."""
    was_training = state.parts.encoder_chunk.training
    state.set_training(False)
    try:
        yield
    finally:
        state.set_training(was_training)
