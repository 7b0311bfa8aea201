"""How many parameters a rank holds, tensor by tensor: the sizes that Megatron-Core's modules have under a layout.

Tensor sizes are counted one by one, not as a sum, because gradient buffers begin each tensor at a multiple of 64.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from megavlm.config.schema import OptimizerConfig, ParallelConfig
from megavlm.models.architecture import Architecture, LanguageArchitecture
from megavlm.planner.families import tower_traits

Sizes = list[int]
"""Elements of each parameter tensor of a rank."""


@dataclass(frozen=True)
class Held:
    """Parameter tensors of a rank, apart by whether they learn.

    Attributes:
        trained: elements of each tensor that has a gradient.
        frozen: of each that has none.
    """

    trained: tuple[int, ...] = ()
    frozen: tuple[int, ...] = ()


@dataclass(frozen=True)
class StateBytes:
    """Bytes of a rank's parameters and of what training keeps for them."""

    weights: int
    gradients: int
    optimizer: float


def decoder_layer_sizes(language: LanguageArchitecture, tensor: int) -> Sizes:
    """One decoder layer on each of `tensor` ranks."""
    query = language.num_attention_heads * language.head_dim
    qkv = query + 2 * language.num_query_groups * language.head_dim
    size, ffn = language.hidden_size, language.ffn_hidden_size
    sizes = [size, qkv * size // tensor, query * size // tensor, size, 2 * ffn * size // tensor, ffn * size // tensor]
    sizes += [qkv // tensor] if language.qkv_bias else []
    return sizes + ([language.head_dim] * 2 if language.qk_norm else [])


def language_sizes(
    language: LanguageArchitecture, tensor: int, num_layers: int, first: bool, last: bool, only: bool
) -> Sizes:
    """A rank's part of the language model.

    Args:
        language: the model.
        tensor: tensor-parallel ranks.
        num_layers: decoder layers on the rank.
        first: it holds the embedding.
        last: it holds the final norm and the output layer.
        only: there is no other stage: a tied output layer is the embedding.
    """
    table = language.vocab_size * language.hidden_size // tensor
    sizes = decoder_layer_sizes(language, tensor) * num_layers
    sizes += [table] if first else []
    if last:
        sizes += [language.hidden_size]
        sizes += [] if language.tied_embeddings and only else [table]
    return sizes


def tower_sizes(
    architecture: Architecture, tensor: int, num_layers: int, first: bool, last: bool
) -> tuple[Sizes, Sizes]:
    """A rank's part of the vision tower: (tensors that learn unless the tower is frozen, tensors that never do)."""
    vision = architecture.vision
    size, ffn = vision.hidden_size, vision.ffn_hidden_size
    norm = [size] if vision.normalization == "RMSNorm" else [size, size]
    middle = 2 * ffn if vision.gated_mlp else ffn
    layer = [*norm, 3 * size * size // tensor, size * size // tensor, size]
    layer += [3 * size // tensor] if vision.qkv_bias else []
    layer += [size // tensor] * 2 if vision.qk_norm_epsilon is not None else []
    layer += [size] * 2 if vision.layer_scale else []
    layer += [*norm, middle * size // tensor, middle // tensor, ffn * size // tensor, size]
    sizes = layer * num_layers
    if first:
        sizes += [vision.patch_channels * size]
        num_positions = vision.num_positions + vision.class_token
        sizes += [num_positions * size] if num_positions else []
        sizes += [size] * (vision.patch_bias + vision.class_token + 2 * vision.pre_norm)
    never: Sizes = []
    if last and vision.carries_final_norm:  # carried along for export
        whole = [size * size] * 4 + [ffn * size] * 2 + [size] * 9 + [ffn]
        never = [size] * 2 + whole * (vision.num_layers - vision.num_computed_layers)
    if last and vision.carries_head:
        never += [3 * size * size, 3 * size, size * size, *[size] * 4, ffn * size, ffn, ffn * size, size]
    return sizes, never


def connector_sizes(architecture: Architecture, tensor: int) -> Sizes:
    """All connectors on each of `tensor` ranks."""
    vision, hidden = architecture.vision, architecture.language.hidden_size
    connector = architecture.connector
    if connector is not None:
        merged = vision.hidden_size * connector.merge_size**2
        return [merged] * 2 + [merged * hidden // tensor, hidden // tensor, hidden * hidden // tensor, hidden]
    merged = vision.hidden_size * vision.merge_size**2
    middle = merged if vision.merge_size > 1 else hidden
    linears = [merged * middle // tensor, middle // tensor, middle * hidden // tensor, hidden]
    if not tower_traits(architecture).merger_norm:
        return linears
    main = [vision.hidden_size] * (1 if vision.normalization == "RMSNorm" else 2) + linears
    return main + ([merged] * 2 + linears) * architecture.num_deepstack


def encoder_held(
    architecture: Architecture, optimizer: OptimizerConfig, tensor: int, num_layers: int, first: bool, last: bool
) -> Held:
    """A rank's part of the encoder, as the recipe trains it."""
    tower, never = tower_sizes(architecture, tensor, num_layers, first, last)
    connectors = connector_sizes(architecture, tensor) if last else []
    trained: Sizes = []
    frozen = list(never)
    (frozen if optimizer.freeze_vit else trained).extend(tower)
    (frozen if optimizer.freeze_aligner else trained).extend(connectors)
    return Held(tuple(trained), tuple(frozen))


def language_held(
    architecture: Architecture, optimizer: OptimizerConfig, tensor: int, num_layers: int, stage: int, num_stages: int
) -> Held:
    """A pipeline rank's part of the language model, as the recipe trains it."""
    first, last = stage == 0, stage == num_stages - 1
    sizes = tuple(language_sizes(architecture.language, tensor, num_layers, first, last, num_stages == 1))
    return Held(frozen=sizes) if optimizer.freeze_llm else Held(trained=sizes)


def state_bytes(held: Held, parallel: ParallelConfig, precision: str, num_copies: int) -> StateBytes:
    """Weights, gradients and optimizer state of a rank.

    Gradients are fp32 always. AdamW keeps two averages in fp32, and an fp32 copy of bf16 weights; the distributed
    optimizer shards these over all ranks that hold a copy of the weights.

    Args:
        held: the rank's parameters.
        parallel: reads `use_distributed_optimizer`.
        precision: fp32 or bf16.
        num_copies: ranks that hold the same parameters (data x context ranks for the language model).
    """
    weight = 4 if precision == "fp32" else 2
    kept = 8 if precision == "fp32" else 12
    num_frozen, num_trained = sum(held.frozen), sum(held.trained)
    if not parallel.use_distributed_optimizer:
        return StateBytes(weight * (num_frozen + num_trained), 4 * num_trained, kept * num_trained)
    padded = _padded(held.trained, num_copies)
    return StateBytes(weight * (num_frozen + padded), 4 * padded, kept * num_trained / num_copies)


def _padded(sizes: Iterable[int], num_copies: int) -> int:
    """Elements of a buffer that begins every tensor at a multiple of 64, and ends at one of the copies and of 128."""
    total = sum(-(-size // 64) * 64 for size in sizes)
    step = math.lcm(num_copies, 128)
    return -(-total // step) * step
