"""Everything a run holds, and how it is put together from a recipe."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.checkpoint.hf_io import HFDirectory, load_weights
from megavlm.config.schema import Recipe
from megavlm.data.dataset import Dataset
from megavlm.data.encode import SampleEncoder
from megavlm.data.images import read_image_spec
from megavlm.data.loader import BatchLoader
from megavlm.data.plan import GlobalBatchPlan
from megavlm.data.readers import read_samples
from megavlm.data.sample import Batch
from megavlm.data.tokens import Tokenizer
from megavlm.models.build import build_chunks, transformer_config, unwrap
from megavlm.models.names import COMPONENTS
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel.groups import Groups, initialize
from megavlm.parallel.wrap import OVERLAP_BUCKET_PARAMETERS, wrap_chunks
from megavlm.platform.seeds import seed_everything
from megavlm.train.freeze import freeze, frozen_components
from megavlm.train.optim import build_optimizer
from megavlm.train.stages.sft import SupervisedFineTuning

logger = logging.getLogger(__name__)


class Stage(Protocol):
    """A training method."""

    def loss(self, logits_LW: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """(sum, count, metrics) of one microbatch on this rank."""


STAGES: dict[str, type[SupervisedFineTuning]] = {"sft": SupervisedFineTuning}


@dataclass
class TrainState:
    """A run in progress. `chunks` are wrapped in DDP, `models` are the same unwrapped."""

    recipe: Recipe
    directory: HFDirectory
    groups: Groups
    config: TransformerConfig
    chunks: list[DistributedDataParallel]
    models: list[VisionLanguageModel]
    optimizer: ChainedOptimizer
    scheduler: OptimizerParamScheduler
    stage: Stage
    train_set: Dataset
    eval_set: Dataset | None
    plan: GlobalBatchPlan
    loader: BatchLoader
    total_steps: int
    step: int = 0
    """Optimizer steps done."""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where tensors of this rank live."""
        return torch.device(torch.cuda.current_device())

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.groups.pipeline.rank() == self.groups.pipeline.size() - 1

    @property
    def learning_components(self) -> list[str]:
        """Components that are trained."""
        frozen = frozen_components(self.recipe.optimizer)
        return [name for name in COMPONENTS if name not in frozen]

    def model_of(self, wrapped: torch.nn.Module) -> VisionLanguageModel:
        """The model inside one of `chunks`."""
        return unwrap(wrapped)

    def set_training(self, training: bool) -> None:
        """Switch dropout and recompute on or off."""
        for chunk in self.chunks:
            chunk.train(training)


def build_encoder(recipe: Recipe, directory: HFDirectory) -> SampleEncoder:
    """What turns rows into tokens for this model."""
    inputs = directory.architecture.inputs
    return SampleEncoder(
        inputs,
        read_image_spec(recipe.model.hf_dir, inputs, recipe.data.min_pixels, recipe.data.max_pixels),
        Tokenizer(recipe.model.hf_dir, inputs.image_token_id),
        recipe.data.max_length,
    )


def build_dataset(paths: tuple[str, ...], recipe: Recipe, encoder: SampleEncoder) -> Dataset:
    """Read and encode rows; says on rank 0 what was dropped.

    Raises:
        UseError: naming the row at fault.
    """
    dataset = Dataset(read_samples(paths, recipe.data.image_dir), encoder)
    report = dataset.prepare()
    for reason, ids in report.dropped.items():
        logger.info("dropped %d of %d rows: %s (first: %s)", len(ids), report.num_rows, reason, ids[0])
    return dataset


def build_state(recipe: Recipe, bucket_size: int = OVERLAP_BUCKET_PARAMETERS) -> TrainState:
    """Put a run together. The process group of the world must exist; every rank calls this with the same recipe.

    Raises:
        UseError: something in recipe, rows or model directory does not fit.
    """
    directory = HFDirectory(recipe.model.hf_dir)
    encoder = build_encoder(recipe, directory)
    train_set = build_dataset(recipe.data.train, recipe, encoder)
    eval_set = build_dataset(recipe.data.eval, recipe, encoder) if recipe.data.eval else None
    groups = initialize(recipe.parallel)
    seed_everything(recipe.train.seed)
    config, chunks, models = build_model(recipe, directory, groups, bucket_size)
    plan = GlobalBatchPlan(
        num_samples=len(train_set),
        seed=recipe.train.seed,
        global_batch_size=recipe.train.global_batch_size,
        micro_batch_size=recipe.train.micro_batch_size,
        dp_size=groups.data.size(),
        shuffle=recipe.data.shuffle,
    )
    total_steps = recipe.train.train_iters or plan.num_steps(recipe.train.num_train_epochs)
    optimizer, scheduler = build_optimizer(recipe, chunks, groups, total_steps)
    config.grad_scale_func = optimizer.scale_loss
    sample_multiple, total_multiple = row_multiples(recipe)
    loader = BatchLoader(
        train_set,
        plan,
        groups.data.rank(),
        groups.data.size(),
        sample_multiple,
        total_multiple,
        recipe.data.dataloader_num_workers,
        load_pixels=groups.pipeline.rank() == 0,
    )
    return TrainState(
        recipe=recipe,
        directory=directory,
        groups=groups,
        config=config,
        chunks=chunks,
        models=models,
        optimizer=optimizer,
        scheduler=scheduler,
        stage=STAGES[recipe.train.stage](groups),
        train_set=train_set,
        eval_set=eval_set,
        plan=plan,
        loader=loader,
        total_steps=total_steps,
    )


def row_multiples(recipe: Recipe) -> tuple[int, int]:
    """What a sample, and a whole packed row, are padded to a multiple of."""
    context = recipe.parallel.context_parallel_size
    sample = 2 * context if context > 1 else 1
    tensor = recipe.parallel.tensor_model_parallel_size if recipe.parallel.sequence_parallel else 1
    # each context rank's part must divide by the sequence-parallel ranks, and the tail segment zig-zags too
    return sample, sample * tensor


def build_model(
    recipe: Recipe, directory: HFDirectory, groups: Groups, bucket_size: int
) -> tuple[TransformerConfig, list[DistributedDataParallel], list[VisionLanguageModel]]:
    """This rank's chunks with the directory's weights, frozen and wrapped as the recipe says."""
    architecture = directory.architecture
    config = transformer_config(architecture, recipe.model, recipe.parallel, recipe.train.precision)
    bare = build_chunks(directory.family, architecture, config, recipe.model.backend, groups)
    models = [unwrap(chunk) for chunk in bare]
    load_weights(directory, models)
    freeze(models, recipe.optimizer)
    chunks = wrap_chunks(bare, config, recipe.parallel, groups, bucket_size)
    for chunk in chunks:
        chunk.train()
    return config, chunks, models


def run_path(recipe: Recipe) -> Path:
    """The run's folder."""
    return Path(recipe.run_dir)


def is_main_rank() -> bool:
    """The one rank that writes logs and reports."""
    return dist.get_rank() == 0
