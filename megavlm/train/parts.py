"""The parts of the model that this rank holds, wrapped for data parallelism."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.checkpoint.adapter_import import load_adapter
from megavlm.checkpoint.hf_io import HFDirectory
from megavlm.checkpoint.hf_load import load_weights
from megavlm.config.numerics import compute_dtype, fp8_recipes, row_multiples
from megavlm.config.schema import Recipe
from megavlm.config.tuning import tuning_plan
from megavlm.data.sample import Batch
from megavlm.models.architecture import Architecture
from megavlm.models.build import build_encoder, build_language_chunks, transformer_config, unwrap
from megavlm.models.chunk import LanguageChunk
from megavlm.models.embedding_head import clamp_logit_scale, initialise_embeddings
from megavlm.models.embedding_noise import embedding_noise
from megavlm.models.encoder import VisionEncoder
from megavlm.models.fp8 import EmulatedFp8, fp8_settings
from megavlm.models.mask_head import initialise_masks
from megavlm.models.names import Part, named_parameters
from megavlm.models.score import initialise_scores
from megavlm.parallel.groups import Groups
from megavlm.parallel.wrap import add_gradients_in_products, wrap_encoder, wrap_language
from megavlm.peft.attach import attach
from megavlm.peft.quantized import quantise_frozen
from megavlm.platform import cpu
from megavlm.platform.userbuffers import start_userbuffers
from megavlm.train.freeze import freeze


def no_noise(batch: Batch) -> None:
    """Nothing is added to word embeddings."""


def embedding_noise_of(recipe: Recipe, hidden_size: int) -> Callable[[Batch], torch.Tensor | None]:
    """What a recipe adds to the word embeddings of a training row; rows of evaluation have no seeds."""
    alpha, seed = recipe.sft.neftune_noise_alpha, recipe.train.seed

    def noise(batch: Batch) -> torch.Tensor | None:
        if batch.noise_seeds_N is None:
            return None
        return embedding_noise(batch.noise_seeds_N, batch.cu_seqlens, batch.real_T, hidden_size, alpha, seed)

    return noise if alpha > 0 else no_noise


@dataclass(frozen=True)
class Parts:
    """What a rank holds.

    Attributes:
        groups: process groups.
        config: Megatron-Core's configuration of the language model.
        chunks: of the language model, in DDP; one empty one on a rank that only encodes.
        models: the same unwrapped; nothing on a rank that only encodes.
        encoder_chunk: the vision encoder in DDP; empty on a rank that has none.
        encoder: the same unwrapped, or None.
        trains_encoder: whether any rank's encoder (tower or projector) learns.
        noise: what is added to the word embeddings of a row in training, [T, H], if anything.
        fp8: what is emulated, if anything is.
        chunk_tokens: tokens whose logits exist at a time; 0: the last chunk gives all of a row.
        offloads: whether activations wait in CPU memory.
        row_tokens: that every row must have, as buffers were made for so many; 0: any number.
    """

    groups: Groups
    config: TransformerConfig
    chunks: tuple[DistributedDataParallel, ...]
    models: tuple[LanguageChunk, ...]
    encoder_chunk: DistributedDataParallel
    encoder: VisionEncoder | None
    trains_encoder: bool
    noise: Callable[[Batch], torch.Tensor | None] = no_noise
    fp8: EmulatedFp8 | None = None
    chunk_tokens: int = 0
    offloads: bool = False
    row_tokens: int = 0

    @property
    def rank(self) -> int:
        """This rank."""
        return dist.get_rank()

    @property
    def device(self) -> torch.device:
        """Where tensors of this rank live."""
        return torch.device(torch.cuda.current_device())

    @property
    def wrapped(self) -> Sequence[DistributedDataParallel]:
        """Everything in DDP, the encoder last."""
        return (*self.chunks, self.encoder_chunk)

    @property
    def all(self) -> Sequence[Part]:
        """Everything that is there, unwrapped."""
        return self.models if self.encoder is None else (*self.models, self.encoder)

    @property
    def learns(self) -> dict[str, bool]:
        """Whether this rank holds weights that learn, by the name of their optimizer."""
        return {
            "language": any(chunk.buffers for chunk in self.chunks),
            "experts": any(chunk.expert_parallel_buffers for chunk in self.chunks),
            "encoder": bool(self.encoder_chunk.buffers),
        }

    def reduce_gradients(self) -> None:
        """Sum gradients over all ranks that hold copies; behind the last backward pass of a step."""
        if self.models:
            finalize_model_grads(list(self.chunks), None, pg_collection=self.groups.language)
        if self.encoder is not None:
            self.encoder_chunk.finish_grad_sync()

    def weights_changed(self) -> None:
        """Have layers that keep an FP8 copy of their weights from one microbatch to the next make it anew.

        Megatron-Core's schedules say so in each step's first microbatch; without it Transformer Engine would go on with
        the weights that it saw first.
        """
        for model in self.all:
            model.set_is_first_microbatch()

    def bound_weights(self) -> None:
        """Bring weights that have a limit back to it; behind every update."""
        for model in self.models:
            clamp_logit_scale(named_parameters(model))

    def scale_gradients(self, factor: float) -> None:
        """Multiply all gradients."""
        for chunk in self.wrapped:
            chunk.scale_gradients(factor)


def build_parts(recipe: Recipe, directory: HFDirectory, groups: Groups, bucket_size: int) -> Parts:
    """This rank's parts with the directory's weights, frozen and wrapped as the recipe says."""
    architecture, parallel = directory.architecture, recipe.parallel
    config = transformer_config(
        architecture, recipe.model, parallel, compute_dtype(recipe), fp8_settings("language", recipe)
    )
    row_tokens = row_multiples(recipe)[1] if parallel.tp_comm_overlap else 0
    if parallel.tp_comm_overlap:
        rank_tokens = row_tokens // parallel.context_parallel_size
        start_userbuffers(groups.tensor, rank_tokens, config.hidden_size, config.params_dtype, config.fp8 is not None)
    bare = build_language_chunks(architecture, config, recipe.model, groups)
    models = [unwrap(chunk) for chunk in bare]
    encoder = build_encoder(
        directory.family, architecture, config, recipe.model.backend, groups, fp8_settings("vision", recipe)
    )
    held: list[Part] = [*models, encoder] if encoder is not None else [*models]
    load_weights(directory, held)
    if directory.new_names:
        _initialise_heads(recipe, directory, held)
    if directory.new_mask_names:
        for part in held:
            initialise_masks(named_parameters(part), recipe.train.seed)
    plan = tuning_plan(recipe)
    quantise_frozen(held, directory.entries, plan, recipe.peft, directory.read_parts, config.params_dtype)
    backend = recipe.model.backend
    attach(held, directory.entries, plan, recipe.peft, recipe.train.seed, config.params_dtype, backend)
    freeze(held, plan)
    if recipe.peft.adapters:
        load_adapter(Path(recipe.peft.adapters), directory, held)
    chunks = wrap_language(bare, config, parallel, groups, bucket_size)
    encoder_chunk = wrap_encoder(encoder, config, parallel, groups, bucket_size)
    parts = Parts(
        groups=groups,
        config=config,
        chunks=tuple(chunks),
        models=tuple(model for model in models if isinstance(model, LanguageChunk)),
        encoder_chunk=encoder_chunk,
        encoder=encoder,
        trains_encoder=plan.learns("vision") or plan.learns("projector"),
        noise=embedding_noise_of(recipe, architecture.language.hidden_size),
        fp8=_emulated(recipe, architecture, held, groups) if recipe.train.precision == "fp8_emulated" else None,
        offloads=parallel.cpu_offloading,
        row_tokens=row_tokens,
        chunk_tokens=recipe.model.cross_entropy_chunk_tokens if recipe.model.cross_entropy_loss_fusion else 0,
    )
    adds_in_products = recipe.train.precision == "fp32" and cpu.uses_cpu()
    for chunk in parts.wrapped:
        if adds_in_products:
            add_gradients_in_products(chunk)
        chunk.train()
    return parts


def _initialise_heads(recipe: Recipe, directory: HFDirectory, parts: Sequence[Part]) -> None:
    knobs = recipe.contrastive
    new = {entry.native for entry in directory.entries if entry.names[0] in directory.new_names}
    temperature = knobs.temperature or {"softmax": 0.07, "sigmoid": 0.1}[knobs.loss_type]
    for part in parts:
        parameters = [(name, parameter) for name, parameter in named_parameters(part) if name in new]
        if part.architecture.language.head == "scores":
            initialise_scores(parameters, recipe.train.seed)
        else:
            initialise_embeddings(parameters, recipe.train.seed, temperature, knobs.logit_bias)


def _emulated(recipe: Recipe, architecture: Architecture, parts: Sequence[Part], groups: Groups) -> EmulatedFp8:
    emulated = EmulatedFp8(groups)
    for part in parts:
        emulated.add(part, fp8_recipes(recipe), recipe.fp8, architecture)
    emulated.check_patterns(recipe.fp8.fp8_exempt)
    return emulated
