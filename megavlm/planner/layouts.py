"""Every layout that a number of GPUs allows, and why others are none.

A layout is counted in the order in which it is ruled out, once: whatever does not divide is named by what does not.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from megavlm.config.layout import split_evenly
from megavlm.config.schema import ParallelConfig, Recipe
from megavlm.config.tuning import tuning_plan
from megavlm.errors import use_error
from megavlm.models.architecture import Architecture
from megavlm.parallel.topology import Topology
from megavlm.planner.experts import quicker_dispatcher

RECOMPUTES: dict[str, dict[str, object]] = {
    "none": {"recompute_granularity": "none"},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ("layernorm", "mlp")},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
"""What may be computed again, with the knobs of a recipe: nothing, norms and MLPs, or every layer whole."""

MAX_TENSOR = 16
MAX_CONTEXT = 16
MAX_CHUNKS = 4


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout in numbers; `parallel_of` makes a recipe's section of it.

    Attributes:
        tensor: tensor-parallel ranks of the language model.
        context: context-parallel ranks.
        pipeline: pipeline stages of the language model.
        data: data ranks.
        chunks: model chunks of a pipeline rank.
        placement: of the encoder.
        vision_tensor: tensor-parallel ranks of an encoder.
        vision_stages: with `stage`, pipeline ranks that hold the encoder.
        vision_data: with `own_ranks`, encoders.
        encode_twice: `vision_recompute`.
        max_live: with `bubble`, microbatches whose encoder activations may be alive.
        extra_in_flight: with `bubble`, microbatches more in flight than in 1F1B.
        recompute: a key of `RECOMPUTES`.
        samples: of a microbatch; 0: packs.
        packing_length: most tokens of a pack.
        expert: ranks that share the experts of a layer; 0: the model has none.
        expert_tensor: ranks that share the matrices of an expert.
        dispatcher: how tokens reach their experts.
    """

    tensor: int
    context: int
    pipeline: int
    data: int
    chunks: int
    placement: str
    vision_tensor: int
    vision_stages: int
    vision_data: int
    encode_twice: bool
    max_live: int
    extra_in_flight: int
    recompute: str
    samples: int
    packing_length: int
    expert: int = 0
    expert_tensor: int = 1
    dispatcher: str = "alltoall"

    @property
    def topology(self) -> Topology:
        """Rank arithmetic."""
        return Topology(
            tensor=self.tensor,
            context=self.context,
            data=self.data,
            pipeline=self.pipeline,
            placement=self.placement,
            vision_tensor=self.vision_tensor,
            vision_stages=self.vision_stages if self.placement == "stage" else 1,
            vision_data=self.vision_data if self.placement == "own_ranks" else 0,
            expert=max(1, self.expert),
            expert_tensor=self.expert_tensor if self.expert_tensor != self.tensor and self.expert else 0,
        )

    @property
    def encoders_a_position(self) -> int:
        """Whole encoders of a data rank at each position that holds some."""
        return self.context * (self.tensor // self.vision_tensor)


@dataclass(frozen=True)
class Space:
    """What may be chosen.

    Attributes:
        num_gpus: all of them are used.
        gpus_per_node: tensor parallelism stays within a node.
        chunk_choices: model chunks of a rank.
        microbatch_choices: (samples, packing length) of a microbatch.
        recomputes: keys of `RECOMPUTES`.
        placements: of the encoder.
    """

    num_gpus: int
    gpus_per_node: int
    microbatch_choices: tuple[tuple[int, int], ...]
    chunk_choices: tuple[int, ...] = (1, 2, 3, 4)
    recomputes: tuple[str, ...] = tuple(RECOMPUTES)
    placements: tuple[str, ...] = ("first_stage", "stage", "spread", "bubble", "own_ranks")


def space_of(recipe: Recipe, num_gpus: int, gpus_per_node: int) -> Space:
    """What a recipe leaves open.

    Raises:
        UseError: `--gpus` below 1.
    """
    if num_gpus < 1:
        raise use_error("--gpus", num_gpus, "at least 1", "give the number of GPUs of the whole job")
    data, batch = recipe.data, recipe.train.global_batch_size
    if data.packing:
        shortest = data.max_length
        recipes_own = data.packing_length or data.max_length
        lengths = sorted({shortest, recipes_own, *(shortest * factor for factor in (2, 4))})
        choices = tuple((0, length) for length in lengths)
    else:
        choices = tuple((size, 0) for size in range(1, min(batch, 16) + 1) if batch % size == 0)
    return Space(num_gpus, gpus_per_node, choices)


def layouts(space: Space, architecture: Architecture, recipe: Recipe, why_not: Counter[str]) -> Iterator[Layout]:
    """Every layout of the space that divides; `why_not` counts those that do not, by reason."""
    for grid in _grids(space, architecture, why_not):
        shared = _expert_choices(architecture, grid, why_not)
        for layout in _placed(space, architecture, recipe, grid, why_not):
            for samples, packing_length in space.microbatch_choices:
                reason = _batch_problem(layout, recipe, samples)
                if reason:
                    why_not[reason] += len(space.recomputes)
                    continue
                for recompute in space.recomputes:
                    for expert, expert_tensor, dispatcher in shared:
                        yield dataclasses.replace(
                            layout,
                            recompute=recompute,
                            samples=samples,
                            packing_length=packing_length,
                            expert=expert,
                            expert_tensor=expert_tensor,
                            dispatcher=dispatcher,
                        )


@dataclass(frozen=True)
class _Grid:
    tensor: int
    context: int
    positions: int
    """Pipeline positions, of encoder stages too."""
    own: tuple[int, int]
    """Encoders on ranks of their own, and their tensor parallelism."""
    data: int


def _expert_choices(architecture: Architecture, grid: _Grid, why_not: Counter[str]) -> list[tuple[int, int, str]]:
    """(ranks that share the experts of a layer, ranks that share an expert, dispatcher).

    Experts are whole where there are enough for the ranks: tensor-parallel ranks that share the matrices of an expert
    hold as many parameters, but each of them gets all their tokens. The dispatcher is the one that sends less.
    """
    experts = architecture.language.experts
    if experts is None:
        return [(0, 1, "alltoall")]
    found = []
    layer_size, number = grid.tensor * grid.context * grid.data, experts.num_experts
    for expert in (size for size in range(1, number + 1) if number % size == 0):
        for tensor in sorted({1, grid.tensor}):
            if layer_size % (expert * tensor):
                why_not["expert parallelism does not divide the ranks of a stage"] += 1
            elif experts.ffn_hidden_size % tensor:
                why_not["tensor parallelism does not divide an expert"] += 1
            elif tensor == 1 or number % (expert * tensor):
                found.append((expert, tensor, quicker_dispatcher(experts, expert, tensor)))
    return found


def _grids(space: Space, architecture: Architecture, why_not: Counter[str]) -> Iterator[_Grid]:
    """Grids of the language model's ranks, and encoders in front of them, that use all GPUs."""
    own_choices = [(0, 1)]
    if "own_ranks" in space.placements:
        own_choices += [
            (encoders, tensor)
            for tensor in _powers(min(space.gpus_per_node, 8))
            for encoders in range(1, space.num_gpus // tensor + 1)
            if encoders * tensor <= max(1, space.num_gpus // 2) and _is_smooth(encoders)
        ]
    for encoders, vision_tensor in own_choices:
        if encoders and _vision_tensor_problem(architecture, vision_tensor):
            why_not["tensor parallelism does not divide the vision tower"] += 1
            continue
        left = space.num_gpus - encoders * vision_tensor
        for tensor in _powers(min(MAX_TENSOR, left)):
            for context in _powers(min(MAX_CONTEXT, left // tensor)):
                for positions in range(1, left // (tensor * context) + 1):
                    reason = _grid_problem(space, architecture, left, tensor, context, positions)
                    if reason:
                        why_not[reason] += 1
                        continue
                    data = left // (tensor * context * positions)
                    yield _Grid(tensor, context, positions, (encoders, vision_tensor), data)


def _grid_problem(
    space: Space, architecture: Architecture, left: int, tensor: int, context: int, positions: int
) -> str:
    """Why a grid is none; empty: it is one."""
    language = architecture.language
    groups = language.num_query_groups
    if left % (tensor * context * positions):
        return "tensor x context x pipeline does not divide the GPUs"
    if tensor > space.gpus_per_node:
        return "tensor parallelism across nodes"
    if any(size % tensor for size in (language.num_attention_heads, language.ffn_hidden_size, language.vocab_size)):
        return "tensor parallelism does not divide the language model"
    if groups % tensor and tensor % groups:
        return "tensor parallelism does not divide the language model"
    if positions > language.num_layers + architecture.vision.num_computed_layers:
        return "more pipeline stages than layers"
    return ""


def _placed(
    space: Space, architecture: Architecture, recipe: Recipe, grid: _Grid, why_not: Counter[str]
) -> Iterator[Layout]:
    """All places of the encoder on a grid, with all numbers of chunks."""
    num_layers = architecture.language.num_layers
    base = Layout(
        tensor=grid.tensor,
        context=grid.context,
        pipeline=grid.positions,
        data=grid.data,
        chunks=1,
        placement="own_ranks",
        vision_tensor=grid.own[1],
        vision_stages=1,
        vision_data=grid.own[0],
        encode_twice=False,
        max_live=0,
        extra_in_flight=0,
        recompute="none",
        samples=1,
        packing_length=0,
    )
    if grid.own[0]:
        if grid.positions <= num_layers:
            yield base
        else:
            why_not["more pipeline stages than layers"] += 1
        return
    plan = tuning_plan(recipe)
    trains = plan.learns("vision") or plan.learns("projector")
    for placement in space.placements:
        for vision_tensor in sorted({1, grid.tensor}):
            if _vision_tensor_problem(architecture, vision_tensor):
                why_not["tensor parallelism does not divide the vision tower"] += 1
                continue
            placed = dataclasses.replace(base, placement=placement, vision_tensor=vision_tensor, vision_data=0)
            if placement == "stage":
                yield from _with_stages(placed, architecture, why_not)
            elif placement in ("first_stage", "spread", "bubble"):
                yield from _with_chunks(placed, space, num_layers, trains, why_not)


def _with_stages(layout: Layout, architecture: Architecture, why_not: Counter[str]) -> Iterator[Layout]:
    """The encoder on the first k of the positions."""
    if layout.pipeline == 1:
        why_not["an encoder stage needs a pipeline"] += 1
    for stages in range(1, layout.pipeline):
        left = layout.pipeline - stages
        if stages > architecture.vision.num_computed_layers or left > architecture.language.num_layers:
            why_not["more pipeline stages than layers"] += 1
            continue
        yield dataclasses.replace(layout, pipeline=left, vision_stages=stages)


def _with_chunks(
    layout: Layout, space: Space, num_layers: int, trains: bool, why_not: Counter[str]
) -> Iterator[Layout]:
    """Several model chunks a rank; spread and bubble with and without encoding twice."""
    if layout.placement == "bubble" and layout.pipeline == 1:
        why_not["a bubble needs a pipeline"] += 1
        return
    for chunks in space.chunk_choices:
        if chunks > 1 and layout.pipeline == 1:
            continue  # the same layout again
        if layout.pipeline * chunks > num_layers:
            why_not["more pipeline stages than layers"] += 1
            continue
        # Interleaved pipelines have that many microbatches in flight at the first stage.
        max_live = layout.pipeline + 4 if chunks == 1 else 2 * layout.pipeline + 4
        placed = dataclasses.replace(layout, chunks=chunks, max_live=max_live if layout.placement == "bubble" else 0)
        yield placed
        if layout.placement in ("spread", "bubble") and trains:
            yield dataclasses.replace(placed, encode_twice=True)
        if layout.placement == "bubble" and trains and chunks == 1:
            yield dataclasses.replace(placed, extra_in_flight=1, max_live=placed.max_live + 1)


def _batch_problem(layout: Layout, recipe: Recipe, samples: int) -> str:
    """Why the global batch does not divide; empty: it does."""
    batch = recipe.train.global_batch_size
    if not samples:
        needed = layout.data * (layout.pipeline if layout.chunks > 1 else 1)
        return "fewer samples than microbatches" if batch < needed else ""
    if batch % (samples * layout.data):
        return "the global batch does not divide by microbatches and data ranks"
    if layout.chunks > 1 and (batch // (samples * layout.data)) % layout.pipeline:
        return "interleaved pipelines want microbatches in multiples of the pipeline"
    return ""


def _vision_tensor_problem(architecture: Architecture, tensor: int) -> bool:
    vision = architecture.vision
    return bool(vision.num_attention_heads % tensor or vision.ffn_hidden_size % tensor)


def _powers(most: int) -> list[int]:
    """1, 2, 4 ... up to `most`."""
    return [1 << exponent for exponent in range(most.bit_length()) if 1 << exponent <= most]


def _is_smooth(number: int) -> bool:
    """Whether a number has no prime factor above 3."""
    for factor in (2, 3):
        while number % factor == 0:
            number //= factor
    return number == 1


def parallel_of(layout: Layout, counts: tuple[int, ...], recipe: Recipe) -> ParallelConfig:
    """A recipe's `parallel` section for a layout.

    Args:
        layout: the layout.
        counts: decoder layers of each stage, in stage order.
        recipe: its other knobs of the section are kept.
    """
    is_even = len(set(counts)) == 1
    own = layout.placement == "own_ranks"
    same = layout.vision_tensor == layout.tensor and not own
    changes: dict[str, object] = dict(RECOMPUTES[layout.recompute])
    if layout.expert:
        changes |= _experts_of(layout)
    changes |= {
        "tensor_model_parallel_size": layout.tensor,
        "sequence_parallel": layout.tensor > 1,
        "context_parallel_size": layout.context,
        "pipeline_model_parallel_size": layout.pipeline + (layout.vision_stages if layout.placement == "stage" else 0),
        "virtual_pipeline_model_parallel_size": layout.chunks,
        "pipeline_model_parallel_layout": "" if is_even else notation(counts),
        "vision_placement": layout.placement,
        "vision_tensor_model_parallel_size": 0 if same else layout.vision_tensor,
        "vision_pipeline_model_parallel_size": layout.vision_stages if layout.placement == "stage" else 1,
        "vision_data_parallel_size": layout.vision_data if own else 1,
        "vision_max_live_microbatches": layout.max_live if layout.placement == "bubble" else 0,
        "vision_extra_microbatches_in_flight": layout.extra_in_flight,
        "vision_recompute": layout.encode_twice,
    }
    for name in ("recompute_method", "recompute_num_layers", "recompute_modules"):
        changes.setdefault(name, vars(ParallelConfig())[name])
    return dataclasses.replace(recipe.parallel, **changes)  # type: ignore[arg-type]


def _experts_of(layout: Layout) -> dict[str, object]:
    """Knobs of a mixture, whose feed-forwards are computed again by a name of their own."""
    changes: dict[str, object] = {
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.topology.expert_tensor,
        "moe_token_dispatcher_type": layout.dispatcher,
    }
    if layout.recompute == "selective":
        changes["recompute_modules"] = ("layernorm", "moe")
    return changes


def notation(counts: tuple[int, ...]) -> str:
    """Megatron's notation of a layer split."""
    return "E" + "|".join("t" * count for count in counts) + "L"


def tower_split(layout: Layout, architecture: Architecture) -> tuple[int, ...]:
    """Layers of the vision tower on each of its stages."""
    return split_evenly(architecture.vision.num_computed_layers, layout.vision_stages)
