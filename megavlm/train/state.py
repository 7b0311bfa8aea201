"""Everything a run holds, and how it is put together from a recipe."""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megavlm.checkpoint.adapters import weights_digest
from megavlm.checkpoint.hf_io import HFDirectory, read_rope_changes
from megavlm.config.layout import layers_per_stage
from megavlm.config.numerics import row_multiples
from megavlm.config.schema import Recipe
from megavlm.config.tuning import tuning_plan
from megavlm.data.balance import SampleCosts
from megavlm.data.dataset import Dataset
from megavlm.data.encode import NUM_PARTS
from megavlm.data.index_files import Builders
from megavlm.data.loader import BatchLoader
from megavlm.data.masks import check_visual_tokens, segment_token_id
from megavlm.data.plan import GlobalBatchPlan
from megavlm.data.token_weights import token_schedule
from megavlm.errors import use_error
from megavlm.models.architecture import MaskHeadArchitecture
from megavlm.models.names import Part
from megavlm.parallel.groups import Groups, initialize
from megavlm.parallel.wrap import OVERLAP_BUCKET_PARAMETERS
from megavlm.pipeline.actions import Payload
from megavlm.pipeline.exchange import make_payload_groups
from megavlm.platform.seeds import seed_everything
from megavlm.train.datasets import build_dataset, build_encoder, build_train_set
from megavlm.train.early_stopping import EarlyStopping
from megavlm.train.freeze import learning_components
from megavlm.train.inputs import CostModel, StepInputs, step_inputs
from megavlm.train.learning import Learning, learning_of
from megavlm.train.optim import build_optimizer
from megavlm.train.order import build_plan, num_steps
from megavlm.train.parts import Parts, build_parts
from megavlm.train.scheduling import Layout, layout_of
from megavlm.train.stages.registry import STAGES
from megavlm.train.stages.stage import Stage

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """A run in progress."""

    recipe: Recipe
    directory: HFDirectory
    groups: Groups
    parts: Parts
    learning: Learning
    optimizer: ChainedOptimizer
    scheduler: OptimizerParamScheduler
    stage: Stage
    train_set: Dataset
    eval_set: Dataset | None
    plan: GlobalBatchPlan
    costs: CostModel
    layout: Layout
    payload_groups: Mapping[Payload, dist.ProcessGroup]
    total_steps: int
    step: int = 0
    """Optimizer steps done."""
    num_skipped: int = 0
    """Those of them that changed nothing, because gradients in fp16 had overflown."""
    evaluation: tuple[int, float] | None = None
    """The last evaluation: steps done by then, loss on the held-out rows."""
    starting_point: str = ""
    """A digest of the model that the run's reference is, where its rows carry what that says (`starting_point.py`)."""

    num_updates: dict[int, int] = field(default_factory=dict)
    """Adam's steps of what has begun to learn, by the step at which it did."""

    def __post_init__(self) -> None:
        self._inputs: dict[int, StepInputs] = {}
        self.token_schedule = token_schedule(self.recipe.data)
        train = self.recipe.train
        self.early_stopping = EarlyStopping(train.early_stopping_patience, train.early_stopping_threshold)
        self.loader = BatchLoader(
            self.train_set,
            lambda step: self.inputs(step).orders,
            *row_multiples(self.recipe),
            self.recipe.data.dataloader_num_workers,
            self.recipe.data.dataloader_prefetch_factor,
            pin_memory=self.device.type == "cuda",
        )

    @functools.cached_property
    def base_digest(self) -> str:
        """Of the directory's weights, where adapters stand beside them."""
        return weights_digest(self.directory) if tuning_plan(self.recipe).has_adapters else ""

    @property
    def device(self) -> torch.device:
        """Where tensors of this rank live."""
        return self.parts.device

    @property
    def learning_components(self) -> list[str]:
        """Components that are trained."""
        return learning_components(tuning_plan(self.recipe))

    @property
    def models(self) -> Sequence[Part]:
        """The parts of the model that this rank holds."""
        return self.parts.all

    def count_update(self, step: int) -> None:
        """Weights were updated in a step (from 0)."""
        for first in self.learning.first_steps:
            if first <= step:
                self.num_updates[first] = self.num_updates.get(first, 0) + 1

    def set_training(self, training: bool) -> None:
        """Switch dropout and recompute on or off."""
        for chunk in self.parts.wrapped:
            chunk.train(training)

    def inputs(self, step: int) -> StepInputs:
        """What this rank loads and encodes in a step (from 0)."""
        if step not in self._inputs:
            topology = self.groups.topology
            # Rows split by cost may be fewer than a step needs packs: a row without weight fills up.
            filler = (int(self.train_set.num_tokens_each.argmin()),)
            rows_D = [
                [(indices or filler, not indices) for indices in self.plan.microbatches(step, data)]
                for data in range(topology.data)
            ]
            while len(self._inputs) >= _KEPT_STEPS:
                self._inputs.pop(next(iter(self._inputs)))
            weights = self.token_schedule.at(step, self.total_steps)
            self._inputs[step] = step_inputs(
                topology, self.parts.rank, self.train_set, rows_D, self.costs, weights, step
            )
        return self._inputs[step]


# Steps whose inputs are kept: the loader's workers go on ahead of the step that is trained.
_KEPT_STEPS = 16


def build_state(recipe: Recipe, bucket_size: int = OVERLAP_BUCKET_PARAMETERS) -> TrainState:
    """Put a run together. The process group of the world must exist; every rank calls this with the same recipe.

    Raises:
        UseError: something in recipe, rows or model directory does not fit.
    """
    directory = open_directory(recipe)
    encoder = build_encoder(recipe, directory)
    builders = Builders(dist.get_rank(), dist.get_world_size(), dist.barrier, _word_of_rank_0)
    train_set, source_sizes = build_train_set(recipe, encoder, builders)
    _check_images(recipe, train_set)
    has_words = STAGES[recipe.train.stage].head == "words"
    if is_main_rank() and has_words and not encoder.tokenizer.end_of_turn_ids():
        logger.warning(
            "the chat template prints no token behind an answer, so the model does not learn to stop; "
            "data.template=vicuna, or a .jinja file, does"
        )
    eval_set = build_dataset(recipe.data.eval, recipe, encoder, builders) if recipe.data.eval else None
    groups = initialize(recipe.parallel)
    seed_everything(recipe.train.seed)
    parts = build_parts(recipe, directory, groups, bucket_size)
    costs = cost_model(recipe, directory, parts.trains_encoder)
    layout = layout_of(recipe.parallel, groups.topology, parts.trains_encoder)
    plan = build_plan(
        recipe,
        train_set,
        source_sizes,
        dp_size=groups.topology.data,
        costs=sample_costs(recipe, train_set, costs) if recipe.data.packing else None,
        microbatches_multiple=groups.topology.pipeline if layout.num_chunks > 1 else 1,
    )
    total_steps = num_steps(recipe, plan)
    learning = learning_of(recipe, directory.architecture, parts.all, total_steps)
    optimizer, scheduler = build_optimizer(recipe, parts, learning, total_steps)
    parts.config.grad_scale_func = optimizer.scale_loss
    return TrainState(
        recipe=recipe,
        directory=directory,
        groups=groups,
        parts=parts,
        learning=learning,
        optimizer=optimizer,
        scheduler=scheduler,
        stage=STAGES[recipe.train.stage].build(recipe, directory.architecture, groups),
        train_set=train_set,
        eval_set=eval_set,
        plan=plan,
        costs=costs,
        layout=layout,
        payload_groups=make_payload_groups(),
        total_steps=total_steps,
    )


def open_directory(recipe: Recipe) -> HFDirectory:
    """The model that a recipe starts from, as its stage needs it.

    Raises:
        UseError: a reward model is given to another stage, or the directory's embeddings have another width.
    """
    head = STAGES[recipe.train.stage].head
    changes = read_rope_changes(Path(recipe.model.hf_dir), recipe.model)
    directory = HFDirectory(recipe.model.hf_dir, reward_model=head == "scores", text_changes=changes)
    if directory.architecture.language.has_score_head and head != "scores":
        raise use_error(
            "model.hf_dir",
            f"a reward model with train.stage {recipe.train.stage}",
            "a model with an output layer over words",
            "give another directory, or set train.stage=rm",
        )
    if recipe.sft.mask_loss_coeff:
        return _with_masks(recipe, directory)
    if head not in ("embeddings", "matches"):
        return directory
    size, stored = recipe.contrastive.embedding_dim, directory.stored_embedding_dim
    if stored and stored != size:
        raise use_error(
            "contrastive.embedding_dim",
            size,
            f"{stored}, as {directory.path} has it",
            f"set contrastive.embedding_dim={stored}",
        )
    return directory.as_embedding_model(size, head == "matches")


def _with_masks(recipe: Recipe, directory: HFDirectory) -> HFDirectory:
    """The directory of a model that tells masks.

    Raises:
        UseError: the model cannot, or the directory has a head of another width.
    """
    check_visual_tokens(directory.architecture.inputs)
    width, stored = recipe.sft.mask_head_dim, directory.stored_mask_width
    if stored and stored != width:
        raise use_error(
            "sft.mask_head_dim", width, f"{stored}, as {directory.path} has it", f"set sft.mask_head_dim={stored}"
        )
    return directory.with_mask_head(MaskHeadArchitecture(width, segment_token_id(directory.path)))


def cost_model(recipe: Recipe, directory: HFDirectory, trains_encoder: bool) -> CostModel:
    """Costs under a recipe's split of the layers."""
    num_layers = directory.architecture.language.num_layers
    counts = layers_per_stage(recipe.parallel, num_layers)
    num_chunks = recipe.parallel.virtual_pipeline_model_parallel_size
    num_stages = len(counts) // num_chunks
    layers = tuple(tuple(counts[stage::num_stages]) for stage in range(num_stages))
    return CostModel(directory.architecture, trains_encoder, layers)


def sample_costs(recipe: Recipe, dataset: Dataset, costs: CostModel) -> SampleCosts:
    """Exact FLOPs of every row's images and tokens, for splitting global batches by cost.

    Raises:
        UseError: a row, padded for the layout, is longer than a packed row may be.
    """
    multiple, _ = row_multiples(recipe)
    parts = NUM_PARTS[dataset.encoder.row_kind]
    # of sequences that share a row only the sum is known: at most so much
    lengths_N = -(-(dataset.num_tokens_each + (parts - 1) * (multiple - 1)) // multiple) * multiple
    stages = [(stage, chunk) for stage, row in enumerate(costs.layers) for chunk in range(len(row))]
    return SampleCosts(
        num_tokens_N=lengths_N,
        encoder_N=np.array([sum(costs.encode(grid) for grid in grids) for grids in dataset.grids_each], dtype=float),
        language_N=np.array(
            [
                sum(costs.decode(*place, [length // parts] * parts, grids) for place in stages)
                for length, grids in zip(lengths_N.tolist(), dataset.grids_each, strict=True)
            ]
        ),
        packing_length=recipe.data.packing_length or recipe.data.max_length,
    )


def _check_images(recipe: Recipe, train_set: Dataset) -> None:
    """An encoder that is given a place of its own needs something to encode."""
    placement = recipe.parallel.vision_placement
    if placement != "first_stage" and not any(train_set.grids_each):
        raise use_error(
            "parallel.vision_placement",
            f"{placement} with rows that have no image at all",
            "rows with images",
            "set parallel.vision_placement=first_stage",
        )


def run_path(recipe: Recipe) -> Path:
    """The run's folder."""
    return Path(recipe.run_dir)


def _word_of_rank_0(own: str) -> str:
    said = [own]
    dist.broadcast_object_list(said)
    return said[0]


def is_main_rank() -> bool:
    """The one rank that writes logs and reports."""
    return dist.get_rank() == 0
