"""A layout's plan: the step time that is simulated, with a lower bound that costs little, and its memory."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from megavlm.config.inputs import Grid
from megavlm.config.schema import Recipe
from megavlm.pipeline.actions import Schedule
from megavlm.pipeline.simulate import Simulation, simulate
from megavlm.planner.layouts import Layout, parallel_of
from megavlm.planner.memory import Load, Memory, RankMemory
from megavlm.planner.parameters import encoder_held, experts_held, language_held, num_elements
from megavlm.planner.stepcosts import Pieces, Played, Problem, least_makespan_s, pieces_of, played, schedule_of
from megavlm.planner.timing import StepEnd, sync_s, update_s
from megavlm.planner.tuned import tuned_of
from megavlm.planner.workload import Pack


@dataclass(frozen=True)
class Plan:
    """A layout and what is expected of it.

    Attributes:
        layout: the layout.
        counts: decoder layers of each stage.
        num_microbatches: of a data rank's step.
        step_s: pipeline and what follows it.
        bubble: idle time of the pipeline's ranks over all their time.
        end: what follows the pipeline.
        mfu: model FLOPs (nothing counted that is computed again) over the peak of all GPUs.
        memory: of the position that needs most.
    """

    layout: Layout
    counts: tuple[int, ...]
    num_microbatches: int
    step_s: float
    bubble: float
    end: StepEnd
    mfu: float
    memory: Memory


@dataclass(frozen=True)
class Candidate:
    """A layout that is not played yet.

    Attributes:
        bound_s: no step under it takes less.
        layout: the layout.
        pieces: what its costs are made of.
        played: its costs.
        end: what follows its pipeline.
    """

    bound_s: float
    layout: Layout
    pieces: Pieces
    played: Played
    end: StepEnd


def bounded(problem: Problem, found: Iterable[Layout]) -> list[Candidate]:
    """Every layout with its costs and a lower bound of its step time."""
    known_pieces: dict[tuple[object, ...], Pieces] = {}
    known_costs: dict[tuple[object, ...], Played] = {}
    known_ends: dict[tuple[object, ...], StepEnd] = {}
    candidates = []
    for layout in found:
        rounds = layout.pipeline if layout.chunks > 1 and not layout.samples else 1
        grid = layout.tensor, layout.context, layout.data, layout.vision_tensor, layout.expert, layout.expert_tensor
        key: tuple[object, ...] = (*grid, layout.recompute, layout.samples, layout.packing_length, rounds)
        pieces = known_pieces.get(key)
        if pieces is None:
            pieces = known_pieces[key] = pieces_of(problem, layout)
        place = layout.placement, layout.pipeline, layout.vision_stages, layout.vision_data
        key = (*key, *place, layout.chunks)  # to encode twice is a matter of the schedule
        costs = known_costs.get(key)
        if costs is None:
            costs = known_costs[key] = played(problem, layout, pieces)
        key = (*grid, *place, costs.counts)
        end = known_ends.get(key)
        if end is None:
            end = known_ends[key] = step_end(problem, layout, costs.counts)
        candidates.append(Candidate(least_makespan_s(layout, costs.costs) + end.total_s, layout, pieces, costs, end))
    return candidates


def with_counts(problem: Problem, candidate: Candidate, counts: tuple[int, ...]) -> Candidate:
    """The same layout with other numbers of decoder layers on its stages."""
    layout = candidate.layout
    costs = played(problem, layout, candidate.pieces, counts)
    end = step_end(problem, layout, counts)
    return Candidate(least_makespan_s(layout, costs.costs) + end.total_s, layout, candidate.pieces, costs, end)


def simulated(problem: Problem, candidate: Candidate) -> tuple[Schedule, Simulation]:
    """A layout's schedule, and how it goes."""
    costs = candidate.played.costs
    schedule = schedule_of(problem, candidate.layout, costs)
    return schedule, simulate(schedule, costs)


def play(problem: Problem, candidate: Candidate) -> Plan:
    """Simulate a layout and add up its memory."""
    layout = candidate.layout
    schedule, simulation = simulated(problem, candidate)
    step_s = simulation.makespan_s + candidate.end.total_s
    recipe = recipe_of(problem.recipe, layout, candidate.played.counts)
    loads = _loads(problem, candidate)
    positions = range(layout.topology.num_positions)
    memories = [
        RankMemory(problem.workload.architecture, recipe, layout.topology, position).peak(schedule, loads[position])
        for position in positions
    ]
    trained = problem.trained
    factor = 3 if trained.language else 2
    workload = problem.workload
    encoder_flops, _ = workload.image_totals
    language_flops = workload.model_flops - encoder_flops
    flops = factor * language_flops + (3 if trained.tower else 1) * encoder_flops
    return Plan(
        layout=layout,
        counts=candidate.played.counts,
        num_microbatches=candidate.pieces.batch.num_microbatches,
        step_s=step_s,
        bubble=1 - sum(simulation.busy_s) / (len(simulation.busy_s) * simulation.makespan_s),
        end=candidate.end,
        mfu=flops / (problem.num_gpus * problem.hardware.peak_flops_per_s * step_s),
        memory=max(memories, key=lambda memory: memory.total),
    )


def recipe_of(recipe: Recipe, layout: Layout, counts: tuple[int, ...]) -> Recipe:
    """The recipe with a layout, and with the microbatches that go with it."""
    parallel = parallel_of(layout, counts, recipe)
    train, data = recipe.train, recipe.data
    if layout.samples:
        train = dataclasses.replace(train, micro_batch_size=layout.samples)
    else:
        data = dataclasses.replace(data, packing=True, packing_length=layout.packing_length)
    return dataclasses.replace(recipe, parallel=parallel, train=train, data=data)


def step_end(problem: Problem, layout: Layout, counts: tuple[int, ...]) -> StepEnd:
    """Reduction of gradients, gathering of weights and the update, of the rank with most."""
    architecture, tuned = problem.workload.architecture, tuned_of(problem.recipe)
    topology, hardware = layout.topology, problem.hardware
    copies = layout.data * layout.context
    layers = _layers_a_rank(layout, counts)
    largest = max(
        num_elements(language_held(architecture, tuned, layout.tensor, numbers, stage, layout.pipeline).trained)
        for stage, numbers in enumerate(layers)
    )
    spanned = layout.tensor * copies
    most = max(layers, key=len)
    held = experts_held(architecture.language, tuned, most, topology.expert, layout.expert_tensor)
    experts, expert_copies = num_elements(held.trained), spanned // (topology.expert * layout.expert_tensor)
    stages = layout.vision_stages if layout.placement == "stage" else 1
    encoder_layers = -(-architecture.vision.num_computed_layers // stages)
    numbers = range(architecture.vision.num_computed_layers)[-encoder_layers:]
    held = encoder_held(architecture, tuned, layout.vision_tensor, numbers, True, True)
    encoder = num_elements(held.trained)
    encoder_copies = len(topology.replicas)
    return StepEnd(
        language_sync_s=sync_s(hardware, largest, copies, spanned) + sync_s(hardware, experts, expert_copies, spanned),
        encoder_sync_s=sync_s(hardware, encoder, encoder_copies, topology.world_size if encoder_copies > 1 else 1),
        optimizer_s=update_s(hardware, largest / copies + experts / expert_copies + encoder / encoder_copies),
    )


def _layers_a_rank(layout: Layout, counts: tuple[int, ...]) -> list[list[int]]:
    """Numbers of the decoder layers of each pipeline rank."""
    ranks: list[list[int]] = [[] for _ in range(layout.pipeline)]
    start = 0
    for stage, count in enumerate(counts):
        ranks[stage % layout.pipeline] += range(start, start + count)
        start += count
    return ranks


def _loads(problem: Problem, candidate: Candidate) -> list[list[Load]]:
    """By position: the fullest data rank's rows, and the images of a rank there that has its share of them."""
    flops_RM = candidate.played.encode_flops_RM
    stages = candidate.layout.vision_stages if candidate.layout.placement == "stage" else 1
    whole_RM = flops_RM * stages if stages > 1 else flops_RM  # a stage runs part of the layers on all the images
    packs = candidate.pieces.batch.fullest
    everything = [pack for rank in candidate.pieces.batch.packs for pack in rank]
    return [
        [
            Load(pack.lengths, _images_for(float(whole_RM[position, m]), pack, everything), pack.num_visual_tokens)
            for m, pack in enumerate(packs)
        ]
        for position in range(len(flops_RM))
    ]


def _images_for(flops: float, pack: Pack, everything: list[Pack]) -> tuple[Grid, ...]:
    """Images that cost about so much: the row's own, then others'."""
    chosen: list[Grid] = []
    left = flops
    for source in (pack, *everything):
        for grid, cost in zip(source.grids, source.image_flops, strict=True):
            if left <= 0.01 * cost:
                return tuple(chosen)
            chosen.append(grid)
            left -= cost
    return tuple(chosen)


def describe(layout: Layout) -> str:
    """A layout in a line, e.g. `TP2 x PP4 x DP8, encoder bubble, recompute full`."""
    parts = [("TP", layout.tensor), ("CP", layout.context), ("PP", layout.pipeline), ("DP", layout.data)]
    text = " x ".join(f"{name}{size}" for name, size in parts if size > 1) or "one GPU"
    if layout.chunks > 1:
        text += f" x VPP{layout.chunks}"
    if layout.expert:
        shared = "" if layout.expert_tensor == layout.tensor else f" of TP{layout.expert_tensor}"
        text += f", experts EP{layout.expert}{shared} {layout.dispatcher}"
    text += f", encoder {layout.placement}"
    if layout.placement == "stage":
        text += f" {layout.vision_stages}"
    if layout.placement == "own_ranks":
        text += f" TP{layout.vision_tensor} x DP{layout.vision_data}"
    elif layout.vision_tensor != layout.tensor:
        text += f" TP{layout.vision_tensor}"
    if layout.encode_twice:
        text += " twice"
    if layout.extra_in_flight:
        text += f" +{layout.extra_in_flight} in flight"
    if layout.recompute != "none":
        text += f", recompute {layout.recompute}"
    size = f"{layout.samples} samples" if layout.samples else f"packs of {layout.packing_length} tokens"
    return f"{text}, {size}"
