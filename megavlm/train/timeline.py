"""Write down what every pipeline position did in one step, beside what the simulator makes of the same schedule."""

from pathlib import Path

import torch.distributed as dist

from megavlm.observe.timeline import TIMELINE_NAME, Band, Timeline, TimelineEvent, write_timeline
from megavlm.parallel.topology import Coordinates, Topology
from megavlm.pipeline.actions import Action, Compute, Send
from megavlm.pipeline.simulate import simulate
from megavlm.train.calibrate import Calibration, fit_position, in_seconds
from megavlm.train.scheduling import step_costs
from megavlm.train.state import TrainState, is_main_rank, run_path
from megavlm.train.step import Recording


def record_timeline(state: TrainState, recording: Recording, step: int, layout: str) -> Path | None:
    """Gather a recorded step from all ranks, and write timeline.json on the main rank; every rank calls this.

    The first data, context and tensor rank of every position is shown.

    Args:
        state: the run.
        recording: of this rank.
        step: from 1.
        layout: its name.
    """
    topology = state.groups.topology
    everyones: list[Recording] = [recording] * dist.get_world_size()
    dist.all_gather_object(everyones, recording)
    if not is_main_rank():
        return None
    shown = [everyones[rank] for rank in shown_ranks(topology)]
    # The costs of the first pipeline: the main rank may encode for all of them.
    home = shown[topology.first_position]
    flops = step_costs(state.layout, home.inputs, state.costs)
    fits = [fit_position(position, [(one.events, flops)]) for position, one in enumerate(shown)]
    calibration = Calibration(tuple(lines for lines, _ in fits), tuple(send_s for _, send_s in fits))
    simulation = simulate(home.schedule, in_seconds(flops, calibration, home.schedule))
    simulated: list[list[TimelineEvent]] = [[] for _ in shown]
    for event in simulation.events:
        simulated[event.rank].append(_event(event.action, event.start_s, event.end_s))
    measured = []
    for one in shown:
        events = [_event(event.action, event.start_s, event.end_s) for event in one.events]
        end_s = events[-1].end_s if events else 0.0
        measured.append((*events, TimelineEvent("reduce", end_s, end_s + one.reduce_s)))
    encode_RM = flops.encode_forward_s_RM + flops.encode_backward_s_RM
    language_RM = (flops.forward_s_RCM + flops.backward_s_RCM).sum(axis=1)
    timeline = Timeline(
        step=step,
        placement=home.schedule.placement,
        layout=layout,
        num_microbatches=home.schedule.num_microbatches,
        pad_share=home.pad_share,
        encoder_costs_RM=tuple(tuple(map(float, row)) for row in encode_RM),
        language_costs_RM=tuple(tuple(map(float, row)) for row in language_RM),
        measured=Band(tuple(measured), max(row[-1].end_s for row in measured)),
        simulated=Band(tuple(tuple(row) for row in simulated), simulation.makespan_s),
    )
    return write_timeline(run_path(state.recipe) / TIMELINE_NAME, timeline)


def shown_ranks(topology: Topology) -> list[int]:
    """Global rank of each schedule position that stands for it: the first one there."""
    ranks = [
        next(rank for rank in range(topology.world_size) if topology.position(rank) == position)
        for position in range(topology.first_position)
    ]
    return ranks + [topology.language_rank(Coordinates(0, 0, 0, stage)) for stage in range(topology.pipeline)]


def _event(action: Action, start_s: float, end_s: float) -> TimelineEvent:
    if isinstance(action, Compute):
        return TimelineEvent(action.kind, start_s, end_s, action.microbatch, action.chunk)
    message = action.message
    kind, peer = ("send", message.destination) if isinstance(action, Send) else ("receive", message.source)
    return TimelineEvent(kind, start_s, end_s, message.microbatch, message.chunk, message.payload, peer)
