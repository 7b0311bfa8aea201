"""A recipe without its machines: is it valid, does it divide, is every rank's model built, does it fit its GPU.

Every distinct rank's part of the model is built as in training, but on torch's meta device, in a process group that
does nothing. What is built, added up over ranks, must be the whole model; memory is the planner's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.checkpoint.hf_io import read_architecture
from megavlm.config.fit import validate_layout, validate_model
from megavlm.config.inputs import Grid
from megavlm.config.layout import layers_per_stage
from megavlm.config.numerics import compute_dtype, row_multiples
from megavlm.config.schema import ModelConfig, Recipe
from megavlm.config.tuning import tuning_plan
from megavlm.config.validate import validate_recipe
from megavlm.data.sample import MicrobatchOrder
from megavlm.errors import RunError, use_error
from megavlm.models.architecture import Architecture
from megavlm.models.build import build_encoder, build_language_chunks, transformer_config, unwrap
from megavlm.models.facts import facts_of
from megavlm.models.family import ModelFamily
from megavlm.models.names import Part, named_parameters, stacked_name
from megavlm.models.registry import family_of
from megavlm.parallel import groups as process_groups
from megavlm.parallel.groups import Groups
from megavlm.parallel.topology import Topology, topology_of
from megavlm.planner.hardware import Hardware, find_hardware
from megavlm.planner.memory import Load, Memory, RankMemory
from megavlm.planner.parameters import encoder_held, experts_held, language_held, num_elements
from megavlm.planner.tuned import tuned_of
from megavlm.platform.pretend import on_meta, pretended_rank
from megavlm.platform.seeds import seed_everything
from megavlm.train.inputs import CostModel, StepInputs
from megavlm.train.scheduling import layout_of, training_schedule
from megavlm.train.shares import ImageKey, share_step

# What rows are taken to hold: so much of each is images, of the grid that an ordinary picture has; and what the mean
# sample has of the longest one's tokens, by which a global batch becomes rows.
VISUAL_SHARE, MEAN_SAMPLE = 0.5, 0.25


@dataclass(frozen=True)
class RankParameters:
    """What a rank holds.

    Attributes:
        rank: global rank.
        position: its schedule position.
        num_alike: ranks that hold parts of the same sizes.
        num_parameters: elements on this rank.
    """

    rank: int
    position: int
    num_alike: int
    num_parameters: int


@dataclass(frozen=True)
class DryRun:
    """What is known of a recipe before it runs.

    Attributes:
        world_size: ranks.
        num_parameters: of the whole model, as its ranks hold it.
        ranks: every distinct one.
        row_tokens: of a full row.
        memory: by schedule position.
        hardware: that it must fit.
    """

    world_size: int
    num_parameters: int
    ranks: tuple[RankParameters, ...]
    row_tokens: int
    memory: tuple[Memory, ...]
    hardware: Hardware

    @property
    def most_bytes(self) -> float:
        """Of the rank that needs most."""
        return max(memory.total for memory in self.memory)

    @property
    def fits(self) -> bool:
        """Whether it is no more than the usable part of the GPU's memory."""
        return self.most_bytes <= self.hardware.usable_memory_bytes


def dry_run(recipe: Recipe, world_size: int, model_dir: Path) -> DryRun:
    """Go through a recipe as far as it goes without machines. No process group may exist.

    Args:
        recipe: as loaded; neither its rows nor its model need to be there.
        world_size: ranks that it is meant for.
        model_dir: has the model's config.json.

    Raises:
        UseError: the recipe is wrong, does not fit its ranks, its model or its GPU.
        RunError: its ranks do not hold the whole model.
    """
    validate_recipe(recipe, check_paths=False)
    validate_layout(recipe, world_size)
    architecture = read_architecture(model_dir, recipe.model)
    validate_model(recipe, facts_of(architecture))
    if not recipe.gpu:
        raise use_error("gpu", "nothing", "the GPU that the recipe is meant for", "e.g. gpu: h100")
    topology = topology_of(recipe.parallel, world_size)
    family = family_of(architecture.family)
    whole: dict[str, int] = {}
    ranks = []
    for alike in _distinct_ranks(topology):
        held = _held_by(alike[0], recipe, architecture, family, topology, whole)
        ranks.append(RankParameters(alike[0], topology.position(alike[0]), len(alike), held))
    num_parameters = sum(whole.values())
    expected = whole_model(architecture)
    if num_parameters != expected:
        raise RunError(f"{recipe.name}: ranks hold {num_parameters} parameters, the model has {expected}")
    row_tokens = recipe.data.packing_length or recipe.data.max_length
    if not recipe.data.packing:
        row_tokens *= recipe.train.micro_batch_size
    row_tokens = -(-row_tokens // row_multiples(recipe)[1]) * row_multiples(recipe)[1]
    memory = estimate_memory(recipe, architecture, topology, row_tokens)
    return DryRun(world_size, num_parameters, tuple(ranks), row_tokens, memory, find_hardware(recipe.gpu))


def whole_model(architecture: Architecture) -> int:
    """Parameters of the whole model, by the planner's arithmetic."""
    everything_learns = tuned_of(Recipe())
    language = architecture.language
    layers = list(range(language.num_layers))
    held = (
        language_held(architecture, everything_learns, 1, layers, 0, 1),
        experts_held(language, everything_learns, layers, 1, 1),
        encoder_held(architecture, everything_learns, 1, range(architecture.vision.num_computed_layers), True, True),
    )
    return sum(num_elements(one.trained) + num_elements(one.frozen) for one in held)


def _distinct_ranks(topology: Topology) -> list[list[int]]:
    """Ranks by what they hold: stage of the language model, stage of the encoder. Parts of one thing are alike."""
    found: dict[tuple[int | None, int | None], list[int]] = {}
    for rank in range(topology.world_size):
        place, part = topology.coordinates(rank), topology.replica_of(rank)
        key = (None if place is None else place.stage, None if part is None else part[1])
        found.setdefault(key, []).append(rank)
    return list(found.values())


def _held_by(
    rank: int,
    recipe: Recipe,
    architecture: Architecture,
    family: ModelFamily,
    topology: Topology,
    whole: dict[str, int],
) -> int:
    """Build a rank's parts; adds to `whole` the sizes of whole tensors by global name. Returns the rank's elements."""
    with pretended_rank(rank, topology.world_size), on_meta():
        groups = process_groups.initialize(recipe.parallel)
        try:
            seed_everything(recipe.train.seed)
            # every backend's modules have the same parameters, and those of torch need no kernels
            model = replace(recipe.model, backend="torch")
            config = transformer_config(architecture, model, recipe.parallel, compute_dtype(recipe))
            parts = _build(architecture, family, config, model, groups)
            held = 0
            for part, is_encoder in parts:
                tensor = groups.vision.tp if is_encoder else groups.tensor
                for name, parameter in named_parameters(part):
                    held += parameter.numel()
                    if name == "language.output_layer.weight" and architecture.language.tied_embeddings:
                        continue  # a copy of the embedding, on another stage
                    _count_whole(name, parameter, tensor.size(), groups, whole)
        finally:
            process_groups.destroy()
    return held


def _build(
    architecture: Architecture, family: ModelFamily, config: TransformerConfig, model: ModelConfig, groups: Groups
) -> list[tuple[Part, bool]]:
    chunks = build_language_chunks(architecture, config, model, groups)
    encoder = build_encoder(family, architecture, config, model.backend, groups)
    parts: list[tuple[Part, bool]] = [(unwrap(chunk), False) for chunk in chunks]
    return parts if encoder is None else [*parts, (encoder, True)]


def _count_whole(name: str, parameter: torch.nn.Parameter, tensor: int, groups: Groups, whole: dict[str, int]) -> None:
    """Size of the tensor that a parameter is a part of; a layer's experts are one tensor."""
    marks = vars(parameter)
    stacked, expert = stacked_name(name)
    if expert is not None:
        # of this rank's experts each adds its part, and every rank that shares the layer has as many
        whole[stacked] = whole.get(stacked, 0) + parameter.numel() * groups.language.expt_tp.size() * (
            groups.language.ep.size()
        )
        return
    whole[name] = parameter.numel() * (tensor if marks.get("tensor_model_parallel", False) else 1)


def estimate_memory(
    recipe: Recipe, architecture: Architecture, topology: Topology, row_tokens: int
) -> tuple[Memory, ...]:
    """Memory by schedule position, when every row is full: half of it images, in one sample."""
    counts = layers_per_stage(recipe.parallel, architecture.language.num_layers)
    num_chunks = recipe.parallel.virtual_pipeline_model_parallel_size
    num_stages = len(counts) // num_chunks
    plan = tuning_plan(recipe)
    trains_encoder = plan.learns("vision") or plan.learns("projector")
    layers = tuple(tuple(counts[stage::num_stages]) for stage in range(num_stages))
    costs = CostModel(architecture, trains_encoder, layers)
    layout = layout_of(recipe.parallel, topology, trains_encoder)
    grids = _images(architecture, row_tokens)
    num_microbatches = _num_microbatches(recipe, topology, row_tokens)
    rows_MD = [dict.fromkeys(range(topology.data), grids)] * num_microbatches
    shares = share_step(topology, rows_MD, costs.encode)
    orders = tuple(MicrobatchOrder((), (), False) for _ in rows_MD)
    inputs = StepInputs(orders, shares, ((row_tokens,),) * num_microbatches, (grids,) * num_microbatches)
    schedule = training_schedule(layout, inputs, costs)
    num_visual_tokens = sum(map(architecture.inputs.num_image_tokens, grids))
    memories = []
    for position in range(topology.num_positions):
        shared = _most_images(topology, position, shares.microbatches[0].owners)
        load = Load((row_tokens,), grids[:1] * shared, num_visual_tokens)
        rank = RankMemory(architecture, recipe, topology, position)
        memories.append(rank.peak(schedule, [load] * num_microbatches))
    return tuple(memories)


def _num_microbatches(recipe: Recipe, topology: Topology, row_tokens: int) -> int:
    """Rows of a data rank in a step."""
    train, data, pipeline = recipe.train, recipe.data, topology.pipeline
    if not data.packing:
        return train.global_batch_size // train.micro_batch_size // topology.data
    tokens = MEAN_SAMPLE * data.max_length * train.global_batch_size / topology.data
    rows = max(1, round(tokens / row_tokens))
    is_interleaved = recipe.parallel.virtual_pipeline_model_parallel_size > 1
    return -(-rows // pipeline) * pipeline if is_interleaved else rows


def _images(architecture: Architecture, row_tokens: int) -> tuple[Grid, ...]:
    """Ordinary pictures that fill half of a row; at least one."""
    inputs = architecture.inputs
    side = inputs.image_px // inputs.patch_px
    by_kind: dict[str, Grid] = {
        "dynamic": (1, 32 * inputs.merge_size, 32 * inputs.merge_size),
        "square": (1, side, side),
        "resized": (1, side, side),
        "tiles": (5, side, side),
        "anyres": (5, side, side, 2, 2 * side // inputs.merge_size, 2 * side // inputs.merge_size),
    }
    grid = by_kind[inputs.image_kind]
    return (grid,) * max(1, int(VISUAL_SHARE * row_tokens) // inputs.num_image_tokens(grid))


def _most_images(topology: Topology, position: int, owners: Mapping[ImageKey, int]) -> int:
    """Images of one microbatch at the encoder of this position that has most; 0 where there is none."""
    numbers = list(owners.values())
    here = [replica.number for replica in topology.replicas if replica.position <= position <= replica.last_position]
    return max((numbers.count(number) for number in here), default=0)


def describe(found: DryRun) -> str:
    """One line."""
    return (
        f"{found.num_parameters / 1e9:.2f} B parameters on {found.world_size} ranks ({len(found.ranks)} kinds), "
        f"rows of {found.row_tokens} tokens, {found.most_bytes / 1e9:.1f} GB at most of "
        f"{found.hardware.usable_memory_bytes / 1e9:.0f} GB usable on {found.hardware.name}"
    )
