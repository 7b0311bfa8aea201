"""How many parameters a rank holds, tensor by tensor: the sizes that Megatron-Core's modules have under a layout.

Tensor sizes are counted one by one, not as a sum, because gradient buffers begin each tensor at a multiple of 64.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from megavlm.config.schema import ParallelConfig
from megavlm.config.tuning import Tuning
from megavlm.models.architecture import Architecture, ConnectorArchitecture, LanguageArchitecture
from megavlm.planner.families import tower_traits
from megavlm.planner.tuned import (
    Matrix,
    Sizes,
    Tuned,
    adapter_sizes,
    connector_matrices,
    decoder_matrices,
    expert_matrices,
    gated_matrices,
    packed_bytes,
    prefix_sizes,
    tower_matrices,
)


def num_elements(sizes: Sizes) -> int:
    """Of all tensors."""
    return sum(size * count for size, count in sizes.items())


def _times(sizes: Sizes, number: int) -> Sizes:
    return Counter({size: count * number for size, count in sizes.items()})


@dataclass(frozen=True)
class Held:
    """Parameter tensors of a rank, apart by whether they learn.

    Attributes:
        trained: tensors that have a gradient, adapters among them.
        frozen: those that have none.
        packed: bytes of matrices in 4 bits, which are among neither.
    """

    trained: Sizes = field(default_factory=Counter)
    frozen: Sizes = field(default_factory=Counter)
    packed: float = 0.0

    def times(self, number: int) -> "Held":
        """So many of this."""
        return Held(_times(self.trained, number), _times(self.frozen, number), self.packed * number)


def together(parts: Iterable[Held]) -> Held:
    """All of these."""
    trained, frozen, packed = Counter[int](), Counter[int](), 0.0
    for part in parts:
        trained.update(part.trained)
        frozen.update(part.frozen)
        packed += part.packed
    return Held(trained, frozen, packed)


@dataclass(frozen=True)
class StateBytes:
    """Bytes of a rank's parameters and of what training keeps for them; `host`: in CPU memory."""

    weights: float
    gradients: float
    optimizer: float
    host: float = 0.0


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


def end_sizes(architecture: Architecture, tensor: int, first: bool, last: bool, only: bool) -> Sizes:
    """A rank's part of the language model outside of layers.

    Args:
        architecture: of the model.
        tensor: tensor-parallel ranks.
        first: it holds the embedding.
        last: it holds the final norm and the output layer.
        only: there is no other stage: a tied output layer is the embedding.
    """
    language = architecture.language
    table = language.vocab_size * language.hidden_size // tensor
    sizes: Sizes = Counter()
    sizes[table] += int(first)
    if last:
        sizes[language.hidden_size] += 1
        sizes[table] += 0 if language.tied_embeddings and only else 1
    return sizes


def tower_layer_sizes(architecture: Architecture, tensor: int) -> Sizes:
    """A layer of the vision tower on each of `tensor` ranks."""
    vision = architecture.vision
    size, ffn = vision.hidden_size, vision.ffn_hidden_size
    norm = [size] if vision.normalization == "RMSNorm" else [size, size]
    middle = 2 * ffn if vision.gated_mlp else ffn
    layer = [*norm, 3 * size * size // tensor, size * size // tensor, size]
    layer += [3 * size // tensor] if vision.qkv_bias else []
    layer += [size // tensor] * 2 if vision.qk_norm_epsilon is not None else []
    layer += [size] * 2 if vision.layer_scale else []
    return Counter(layer + [*norm, middle * size // tensor, middle // tensor, ffn * size // tensor, size])


def tower_end_sizes(architecture: Architecture, first: bool, last: bool) -> tuple[Sizes, Sizes]:
    """A rank's part of the tower outside of layers: (tensors that learn unless it is frozen, those that never do)."""
    vision = architecture.vision
    size, ffn = vision.hidden_size, vision.ffn_hidden_size
    sizes: list[int] = []
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


def _held(
    sizes: Sizes, matrices: Sequence[Matrix], tuned: Tuned, component: str, tuning: Tuning, tensor: int, prefix: int = 0
) -> Held:
    """Tensors of one kind, as they learn.

    Args:
        sizes: all of them.
        matrices: linears among them that may be adapted.
        tuned: how everything learns.
        component: that they are of.
        tuning: how these learn.
        tensor: ranks that share the linears.
        prefix: width of all key/value heads of an attention among them.
    """
    if tuning.method == "full":
        return Held(trained=sizes)
    adapters = prefix_sizes(tuning, prefix) if prefix else Counter[int]()
    for matrix in matrices:
        adapters.update(adapter_sizes(matrix, tuning, tuned.peft, tensor))
    if not tuned.quantises(component, tuning):
        return Held(adapters, sizes)
    kept = Counter(sizes)
    kept.subtract([matrix.num_inputs * matrix.num_outputs // tensor for matrix in matrices])
    packed = sum(packed_bytes(matrix, tensor, tuned.peft.bnb_4bit_use_double_quant) for matrix in matrices)
    return Held(adapters, kept, packed)


def encoder_held(architecture: Architecture, tuned: Tuned, tensor: int, layers: range, first: bool, last: bool) -> Held:
    """A rank's part of the encoder, as the recipe trains it.

    Args:
        architecture: of the model.
        tuned: how everything learns.
        tensor: ranks that share it.
        layers: numbers of the tower's layers on the rank.
        first: it embeds the patches.
        last: it has the connectors.
    """
    ends, never = tower_end_sizes(architecture, first, last)
    parts = [_held(ends, (), tuned, "vision", tuned.of("vision", None), tensor), Held(frozen=never)]
    layer, matrices = tower_layer_sizes(architecture, tensor), tower_matrices(architecture)
    for tuning, number in Counter(tuned.of("vision", number) for number in layers).items():
        width = architecture.vision.hidden_size
        parts.append(_held(layer, matrices, tuned, "vision", tuning, tensor, prefix=width).times(number))
    if last:
        sizes, num_connectors = connector_sizes(architecture, tensor), 1 + architecture.num_deepstack
        matrices = connector_matrices(architecture) * num_connectors
        parts.append(_held(sizes, matrices, tuned, "projector", tuned.of("projector", None), tensor))
    return together(parts)


def language_held(
    architecture: Architecture, tuned: Tuned, tensor: int, layers: Sequence[int], stage: int, num_stages: int
) -> Held:
    """A pipeline rank's part of the language model but for experts, as the recipe trains it.

    Args:
        architecture: of the model.
        tuned: how everything learns.
        tensor: tensor-parallel ranks.
        layers: numbers of the decoder layers on the rank.
        stage: of the rank.
        num_stages: of the language model.
    """
    language, interval = architecture.language, architecture.gate_interval
    ends = end_sizes(architecture, tensor, stage == 0, stage == num_stages - 1, num_stages == 1)
    parts = [_held(ends, (), tuned, "language", tuned.of("language", None), tensor)]
    layer, matrices = decoder_layer_sizes(language, tensor), decoder_matrices(language)
    width = language.num_query_groups * language.head_dim
    for tuning, number in Counter(tuned.of("language", number) for number in layers).items():
        parts.append(_held(layer, matrices, tuned, "language", tuning, tensor, prefix=width).times(number))
    gated = [number for number in layers if interval and number % interval == 0]
    for tuning, number in Counter(tuned.of("language", number) for number in gated).items():
        sizes = gated_layer_sizes(language, tensor)
        parts.append(_held(sizes, gated_matrices(language), tuned, "language", tuning, tensor).times(number))
    return together(parts)


def experts_held(
    language: LanguageArchitecture, tuned: Tuned, layers: Sequence[int], expert: int, expert_tensor: int
) -> Held:
    """A rank's experts in some layers, as the recipe trains them; none in a model that is no mixture.

    Args:
        language: the model.
        tuned: how everything learns.
        layers: numbers of the decoder layers of the rank.
        expert: ranks that share the experts of a layer.
        expert_tensor: ranks that share the matrices of an expert.
    """
    if language.experts is None:
        return Held()
    matrix = language.experts.ffn_hidden_size * language.hidden_size // expert_tensor
    sizes, matrices = Counter([2 * matrix, matrix]), expert_matrices(language.experts, language.hidden_size)
    experts = language.experts.num_experts // expert
    return together(
        _held(sizes, matrices, tuned, "language", tuning, expert_tensor).times(number * experts)
        for tuning, number in Counter(tuned.of("language", number) for number in layers).items()
    )


def state_bytes(held: Held, parallel: ParallelConfig, precision: str, num_copies: int) -> StateBytes:
    """Weights, gradients and optimizer state of a rank.

    Gradients are fp32 always. AdamW keeps two averages in fp32, and an fp32 copy of weights in bf16 or fp16; the
    distributed optimizer shards these over all ranks that hold a copy of the weights, and may have a part of them in
    CPU memory.

    Args:
        held: the rank's parameters.
        parallel: reads `use_distributed_optimizer` and what follows `optimizer_cpu_offload`.
        precision: fp32, bf16 or fp16.
        num_copies: ranks that hold the same parameters (for the language model data x context ranks, for experts the
            ranks of a stage over those that share them).
    """
    weight = 4 if precision == "fp32" else 2
    kept = 8 if precision == "fp32" else 12
    num_frozen, num_trained = num_elements(held.frozen), num_elements(held.trained)
    if not parallel.use_distributed_optimizer:
        return StateBytes(weight * (num_frozen + num_trained) + held.packed, 4 * num_trained, kept * num_trained)
    padded, own = _padded(held.trained, num_copies), num_trained / num_copies
    away = parallel.optimizer_offload_fraction if parallel.optimizer_cpu_offload else 0.0
    return StateBytes(
        weight * (num_frozen + padded) + held.packed,
        4 * padded,
        kept * own * (1 - away),
        (kept + 4) * own * away,  # gradients in fp32 wait there as well
    )


def _padded(sizes: Sizes, num_copies: int) -> int:
    """Elements of a buffer that begins every tensor at a multiple of 64, and ends at one of the copies and of 128."""
    total = sum(-(-size // 64) * 64 * count for size, count in sizes.items())
    step = math.lcm(num_copies, 128)
    return -(-total // step) * step
