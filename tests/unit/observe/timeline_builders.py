"""Timelines for the tests of this folder, from the simulator's events and from events by hand."""

import random

from megavlm.observe.timeline import Band, Timeline, TimelineEvent
from megavlm.pipeline.actions import Compute
from megavlm.pipeline.bubble import bubble
from megavlm.pipeline.costs import Link, StageCosts, stage_costs
from megavlm.pipeline.schedules import first_stage, spread, vision_stages
from megavlm.pipeline.simulate import Simulation, simulate


def event(kind, start_s, end_s, microbatch=0, chunk=0, payload=None, peer=None) -> TimelineEvent:
    return TimelineEvent(kind, start_s, end_s, microbatch, chunk, payload, peer)


def simulated_band(simulation: Simulation, num_ranks: int) -> Band:
    rows: list[list[TimelineEvent]] = [[] for _ in range(num_ranks)]
    for one in simulation.events:
        if isinstance(one.action, Compute):
            made = event(one.action.kind, one.start_s, one.end_s, one.action.microbatch, one.action.chunk)
        else:
            message = one.action.message
            place = message.microbatch, message.chunk, message.payload, message.source
            made = event("receive", one.start_s, one.end_s, *place)
        rows[one.rank].append(made)
    return Band(tuple(tuple(row) for row in rows), simulation.makespan_s)


def uneven_costs(num_ranks, num_microbatches, num_chunks=1, seed=0, scale=1.0) -> StageCosts:
    """Seconds; the encoder's vary by microbatch, `scale` times a bit of noise makes the measured ones of them."""
    draw = random.Random(seed)
    images = [draw.lognormvariate(0, 0.7) for _ in range(num_microbatches)]
    texts = [draw.uniform(0.9, 1.1) for _ in range(num_microbatches)]

    def noisy(value):
        return value * scale * (1 + (0.04 * draw.random() if scale != 1.0 else 0))

    language = [[[noisy(0.010 * one) for one in texts] for _ in range(num_chunks)] for _ in range(num_ranks)]
    encoder = [[noisy(0.004 * one) for one in images] for _ in range(num_ranks)]
    return stage_costs(
        num_ranks,
        num_chunks,
        num_microbatches,
        forward_s=language,
        backward_s=[[[2 * value for value in row] for row in chunk] for chunk in language],
        encode_forward_s=encoder,
        encode_backward_s=[[2 * value for value in row] for row in encoder],
        activation_bytes=1.0,
        feature_bytes=1.0,
        link=Link(bandwidth_bytes_per_s=1000.0, latency_s=0.0002),
    )


def make_schedule(placement, num_ranks, num_microbatches, costs, num_chunks=1):
    if placement == "bubble":
        live = num_ranks + 2 if num_chunks == 1 else 3 * num_ranks
        return bubble(num_ranks, num_microbatches, costs, max_live_encoder=live, num_chunks=num_chunks)
    if placement == "stage":
        return vision_stages(1, num_ranks - 1, num_microbatches)
    maker = {"spread": spread, "first_stage": first_stage}[placement]
    return maker(num_ranks, num_microbatches, num_chunks=num_chunks)


def realistic_timeline(placement="bubble", num_ranks=4, num_microbatches=8, num_chunks=1) -> Timeline:
    """A step planned with some costs and run with others: slower, sends and gaps between, a reduction at the end."""
    planned = uneven_costs(num_ranks, num_microbatches, num_chunks)
    schedule = make_schedule(placement, num_ranks, num_microbatches, planned, num_chunks)
    real = uneven_costs(num_ranks, num_microbatches, num_chunks, scale=1.02)
    measured = simulated_band(simulate(schedule, real), num_ranks)
    end_s = measured.makespan_s
    rows = []
    for row in measured.ranks:
        shortened = [
            event(one.kind, one.start_s, one.end_s - 0.0002, one.microbatch, one.chunk, one.payload, one.peer)
            if one.kind != "receive"
            else one
            for one in row
        ]
        rows.append((*shortened, event("reduce", end_s, end_s + 0.012)))
    encoder = {rank for rank in range(num_ranks) if any(c.kind[0] == "E" for c in schedule.computes(rank))}
    language = {rank for rank, _ in schedule.stage_map.stages}
    return Timeline(
        step=3,
        placement=placement,
        layout=f"TP2 x PP{num_ranks}",
        num_microbatches=num_microbatches,
        pad_share=0.004,
        encoder_costs_RM=_table(planned.encode_forward_s_RM, encoder),
        language_costs_RM=_table(planned.forward_s_RCM.sum(axis=1), language),
        measured=Band(tuple(rows), end_s + 0.012),
        simulated=simulated_band(simulate(schedule, planned), num_ranks),
    )


def _table(costs_RM, ranks):
    return tuple(tuple(float(value) if rank in ranks else 0.0 for value in row) for rank, row in enumerate(costs_RM))
