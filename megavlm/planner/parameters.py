"""How many parameters a rank holds, tensor by tensor: the sizes that Megatron-Core's modules have under a layout.

Tensor sizes are counted one by one, not as a sum, because gradient buffers begin each tensor at a multiple of 64.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from megavlm.config.schema import OptimizerConfig, ParallelConfig
from megavlm.models.architecture import Architecture, ConnectorArchitecture, LanguageArchitecture
from megavlm.planner.families import tower_traits

Sizes = Counter[int]
"""How many parameter tensors of a rank have so many elements."""


def num_elements(sizes: Sizes) -> int:
    """Of all tensors."""
    return sum(size * count for size, count in sizes.items())


def _times(sizes: Sizes, number: int) -> Sizes:
    return Counter({size: count * number for size, count in sizes.items()})


@dataclass(frozen=True)
class Held:
    """Parameter tensors of a rank, apart by whether they learn.

    Attributes:
        trained: tensors that have a gradient.
        frozen: those that have none.
    """

    trained: Sizes = field(default_factory=Counter)
    frozen: Sizes = field(default_factory=Counter)


@dataclass(frozen=True)
class StateBytes:
    """Bytes of a rank's parameters and of what training keeps for them."""

    weights: int
    gradients: int
    optimizer: float


def decoder_layer_sizes(language: LanguageArchitecture, tensor: int) -> Sizes:
    """One decoder layer on each of `tensor` ranks; of a mixture without the experts, which are shared out otherwise."""
    query = language.num_attention_heads * language.head_dim
    qkv = query + 2 * language.num_query_groups * language.head_dim
    size, ffn = language.hidden_size, language.ffn_hidden_size
    sizes = [size, qkv * size // tensor, query * size // tensor, size]
    if language.experts is None:
        sizes += [2 * ffn * size // tensor, ffn * size // tensor]
    else:  # the router is whole on every rank
        sizes += [language.experts.num_experts * size]
    sizes += [qkv // tensor] if language.qkv_bias else []
    return Counter(sizes + ([language.head_dim] * 2 if language.qk_norm else []))


def gated_layer_sizes(language: LanguageArchitecture, tensor: int) -> Sizes:
    """What a decoder layer that reads images (Flamingo) has beside its own, on each of `tensor` ranks."""
    width = language.num_attention_heads * language.head_dim
    size, ffn = language.hidden_size, language.ffn_hidden_size
    gates = [1, 1]
    return Counter([size, *[width * size // tensor] * 4, size, 2 * ffn * size // tensor, ffn * size // tensor, *gates])


def language_sizes(
    architecture: Architecture, tensor: int, layers: Sequence[int], first: bool, last: bool, only: bool
) -> Sizes:
    """A rank's part of the language model, without experts.

    Args:
        architecture: of the model.
        tensor: tensor-parallel ranks.
        layers: numbers of the decoder layers on the rank.
        first: it holds the embedding.
        last: it holds the final norm and the output layer.
        only: there is no other stage: a tied output layer is the embedding.
    """
    language, interval = architecture.language, architecture.gate_interval
    table = language.vocab_size * language.hidden_size // tensor
    sizes = _times(decoder_layer_sizes(language, tensor), len(layers))
    if interval:
        sizes += _times(gated_layer_sizes(language, tensor), sum(number % interval == 0 for number in layers))
    sizes[table] += int(first)
    if last:
        sizes[language.hidden_size] += 1
        sizes[table] += 0 if language.tied_embeddings and only else 1
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
    never: list[int] = []
    if last and vision.carries_final_norm:  # carried along for export
        whole = [size * size] * 4 + [ffn * size] * 2 + [size] * 9 + [ffn]
        never = [size] * 2 + whole * (vision.num_layers - vision.num_computed_layers)
    if last and vision.carries_head:
        never += [3 * size * size, 3 * size, size * size, *[size] * 4, ffn * size, ffn, ffn * size, size]
    return Counter(sizes), Counter(never)


def connector_sizes(architecture: Architecture, tensor: int) -> Sizes:
    """All connectors on each of `tensor` ranks."""
    vision, hidden = architecture.vision, architecture.language.hidden_size
    connector = architecture.connector
    if connector is not None and connector.num_queries:
        return _resampler_sizes(architecture, connector)
    if connector is not None:
        merged = vision.hidden_size * connector.merge_size**2
        norm = [merged] * 2 if connector.kind == "pixel_shuffle_mlp" else []
        return Counter([*norm, merged * hidden // tensor, hidden // tensor, hidden * hidden // tensor, hidden])
    merged = vision.hidden_size * vision.merge_size**2
    middle = merged if vision.merge_size > 1 else hidden
    linears = [merged * middle // tensor, middle // tensor, middle * hidden // tensor, hidden]
    newline = [hidden] if architecture.inputs.image_kind == "anyres" else []
    if not tower_traits(architecture).merger_norm:
        return Counter(linears + newline)
    main = [vision.hidden_size] * (1 if vision.normalization == "RMSNorm" else 2) + linears
    return Counter(main + ([merged] * 2 + linears) * architecture.num_deepstack)


def _resampler_sizes(architecture: Architecture, connector: ConnectorArchitecture) -> Sizes:
    """A connector with learned queries, whole on every rank."""
    tower, size = architecture.vision.hidden_size, architecture.language.hidden_size
    if connector.kind == "qformer":
        return _qformer_sizes(connector, tower, size)
    middle = architecture.language.ffn_hidden_size
    wide, narrow = connector.num_heads * connector.head_dim, connector.num_key_value_heads * connector.head_dim
    layer = [size] * 3 + [size * wide] * 2 + [size * narrow] * 2 + [4 * size * size] * 3
    ends = [tower * middle] * 2 + [middle * size, connector.num_queries * size, size]
    return Counter(ends + layer * connector.depth)


def _qformer_sizes(connector: ConnectorArchitecture, tower: int, size: int) -> Sizes:
    width, ffn = connector.hidden_size, connector.ffn_hidden_size
    sizes = [connector.num_queries * width, width, width, width * size, size]
    for number in range(connector.depth):
        read = [width, tower] if number % connector.cross_attention_frequency == 0 else [width]
        for source in read:  # query, key, value and output with biases, and a norm
            sizes += [width * width] * 2 + [source * width] * 2 + [width] * 6
        sizes += [width * ffn] * 2 + [ffn, width, width, width]
    return Counter(sizes)


def encoder_held(
    architecture: Architecture, optimizer: OptimizerConfig, tensor: int, num_layers: int, first: bool, last: bool
) -> Held:
    """A rank's part of the encoder, as the recipe trains it."""
    tower, never = tower_sizes(architecture, tensor, num_layers, first, last)
    connectors = connector_sizes(architecture, tensor) if last else Counter[int]()
    trained, frozen = Counter[int](), Counter(never)
    (frozen if optimizer.freeze_vit else trained).update(tower)
    (frozen if optimizer.freeze_aligner else trained).update(connectors)
    return Held(trained, frozen)


def language_held(
    architecture: Architecture,
    optimizer: OptimizerConfig,
    tensor: int,
    layers: Sequence[int],
    stage: int,
    num_stages: int,
) -> Held:
    """A pipeline rank's part of the language model but for experts, as the recipe trains it."""
    first, last = stage == 0, stage == num_stages - 1
    sizes = language_sizes(architecture, tensor, layers, first, last, num_stages == 1)
    return Held(frozen=sizes) if optimizer.freeze_llm else Held(trained=sizes)


def experts_held(
    language: LanguageArchitecture, optimizer: OptimizerConfig, num_layers: int, expert: int, expert_tensor: int
) -> Held:
    """A rank's experts in so many layers, as the recipe trains them; none in a model that is no mixture.

    Args:
        language: the model.
        optimizer: says what is frozen.
        num_layers: decoder layers of the rank.
        expert: ranks that share the experts of a layer.
        expert_tensor: ranks that share the matrices of an expert.
    """
    if language.experts is None:
        return Held()
    matrix = language.experts.ffn_hidden_size * language.hidden_size // expert_tensor
    number = language.experts.num_experts // expert * num_layers
    sizes = Counter({2 * matrix: number, matrix: number})
    return Held(frozen=sizes) if optimizer.freeze_llm else Held(trained=sizes)


def state_bytes(held: Held, parallel: ParallelConfig, precision: str, num_copies: int) -> StateBytes:
    """Weights, gradients and optimizer state of a rank.

    Gradients are fp32 always. AdamW keeps two averages in fp32, and an fp32 copy of weights in bf16 or fp16; the
    distributed optimizer shards these over all ranks that hold a copy of the weights.

    Args:
        held: the rank's parameters.
        parallel: reads `use_distributed_optimizer`.
        precision: fp32, bf16 or fp16.
        num_copies: ranks that hold the same parameters (for the language model data x context ranks, for experts the
            ranks of a stage over those that share them).
    """
    weight = 4 if precision == "fp32" else 2
    kept = 8 if precision == "fp32" else 12
    num_frozen, num_trained = num_elements(held.frozen), num_elements(held.trained)
    if not parallel.use_distributed_optimizer:
        return StateBytes(weight * (num_frozen + num_trained), 4 * num_trained, kept * num_trained)
    padded = _padded(held.trained, num_copies)
    return StateBytes(weight * (num_frozen + padded), 4 * padded, kept * num_trained / num_copies)


def _padded(sizes: Sizes, num_copies: int) -> int:
    """Elements of a buffer that begins every tensor at a multiple of 64, and ends at one of the copies and of 128."""
    total = sum(-(-size // 64) * 64 * count for size, count in sizes.items())
    step = math.lcm(num_copies, 128)
    return -(-total // step) * step
