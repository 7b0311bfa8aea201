"""Exact matrix-multiplication FLOPs of a vision-language model's forward pass, per image and per packed row.

A multiply-add counts as two. Element-wise work, norms and softmax are left out, as is usual; they are a few percent.
A trained module costs three times its forward pass, a frozen one once, a frozen one that passes gradients on twice.
Attention is counted in full for vision (every patch of a segment sees every other) and, for causal language models,
by what is computed: the whole square (as unfused and most fused kernels are credited), or its lower half.
A token is computed by the experts that it has chosen and by no other; routing drops none. To join, shrink and break
tiles into lines (`models/anyres.py`) takes no matrix product.
"""

import math
from collections.abc import Sequence

from megavlm.config.inputs import Grid
from megavlm.models.architecture import (
    Architecture,
    ConnectorArchitecture,
    LanguageArchitecture,
    VisionArchitecture,
)


def tower_flops(vision: VisionArchitecture, grid: Grid) -> int:
    """Forward FLOPs of the vision tower on one image of `grid` (frames, rows, columns) patches.

    Attention stays inside each frame, or inside its windows.
    """
    frames, rows, columns = grid[:3]
    segment = rows * columns + vision.class_token
    tokens = frames * segment
    size, layers = vision.hidden_size, vision.num_computed_layers
    linear = 2 * tokens * (4 * size * size + (3 if vision.gated_mlp else 2) * size * vision.ffn_hidden_size)
    num_full = sum(number < layers for number in vision.full_attention_layers) if vision.window else layers
    squares = num_full * segment**2
    if num_full < layers:
        squares += (layers - num_full) * sum(length**2 for length in window_lengths(vision, rows, columns))
    embed = 2 * frames * rows * columns * vision.patch_channels * size
    return embed + layers * linear + 2 * 2 * frames * squares * size


def window_lengths(vision: VisionArchitecture, rows: int, columns: int) -> list[int]:
    """Patches of each window of a frame; those at its right and lower edge may be smaller."""
    side = vision.window * vision.merge_size

    def spans(extent: int) -> list[int]:
        return [min(side, extent - start) for start in range(0, extent, side)]

    return [height * width for height in spans(rows) for width in spans(columns)]


def connector_flops(architecture: Architecture, grid: Grid) -> int:
    """Forward FLOPs of all connectors (the projector, and DeepStack's) on one image."""
    connector = architecture.connector
    if connector is not None and connector.num_queries:
        return grid[0] * _resampler_flops(architecture, connector, grid[1] * grid[2])
    if connector is not None:
        return _chosen_mlp_flops(architecture, connector, math.prod(grid[:3]))
    vision, hidden = architecture.vision, architecture.language.hidden_size
    merged = vision.hidden_size * vision.merge_size**2
    middle = merged if vision.merge_size > 1 else hidden
    tokens = math.prod(grid[:3]) // vision.merge_size**2
    one = 2 * tokens * (merged * middle + middle * hidden)
    return one * (1 + architecture.num_deepstack)


def _chosen_mlp_flops(architecture: Architecture, connector: ConnectorArchitecture, patches: int) -> int:
    hidden, merge = architecture.language.hidden_size, connector.merge_size**2
    return 2 * (patches // merge) * (architecture.vision.hidden_size * merge * hidden + hidden * hidden)


def _resampler_flops(architecture: Architecture, connector: ConnectorArchitecture, patches: int) -> int:
    """Forward FLOPs of a connector with learned queries on one frame."""
    tower, size, queries = architecture.vision.hidden_size, architecture.language.hidden_size, connector.num_queries
    if connector.kind in ("perceiver", "gated_cross_attention"):
        middle = architecture.language.ffn_hidden_size
        wide = connector.num_heads * connector.head_dim
        narrow = connector.num_key_value_heads * connector.head_dim
        seen = patches + queries
        layer = 2 * (2 * queries * size * wide + 2 * seen * size * narrow + 3 * queries * size * 4 * size)
        layer += 2 * 2 * queries * seen * wide
        return 2 * patches * (2 * tower * middle + middle * size) + connector.depth * layer
    width = connector.hidden_size
    own = 2 * queries * (4 * width * width + 2 * width * connector.ffn_hidden_size) + 2 * 2 * queries * queries * width
    reading = 2 * (2 * queries * width * width + 2 * patches * tower * width) + 2 * 2 * queries * patches * width
    num_reading = -(-connector.depth // connector.cross_attention_frequency)
    return connector.depth * own + num_reading * reading + 2 * queries * width * size


def image_flops(architecture: Architecture, grid: Grid) -> int:
    """Forward FLOPs that one image costs before the language model."""
    return tower_flops(architecture.vision, grid) + connector_flops(architecture, grid)


def decoder_layer_flops(language: LanguageArchitecture, lengths: Sequence[int], causal_half: bool = False) -> int:
    """Forward FLOPs of one decoder layer on a packed row of samples with these lengths in tokens."""
    tokens = sum(lengths)
    width = language.num_attention_heads * language.head_dim
    key_value = 2 * language.num_query_groups * language.head_dim
    size = language.hidden_size
    mlp = 3 * size * language.ffn_hidden_size
    if language.experts is not None:
        experts = language.experts
        mlp = size * experts.num_experts + experts.top_k * 3 * size * experts.ffn_hidden_size
    linear = 2 * tokens * (size * (width + key_value) + width * size + mlp)
    attention = 2 * 2 * width * sum(length * length for length in lengths)
    return linear + (attention // 2 if causal_half else attention)


def head_flops(language: LanguageArchitecture, num_tokens: int) -> int:
    """Forward FLOPs of the output layer."""
    return 2 * num_tokens * language.hidden_size * language.vocab_size


def gated_layer_flops(language: LanguageArchitecture, num_tokens: int, num_visual_tokens: int) -> int:
    """Forward FLOPs of what reads the images in front of a decoder layer (gated cross-attention and its MLP).

    Keys and values are made of the features beside every token, and every token's scores are of all visual tokens of
    the row, of other images too, which are then masked: what `models/gated.py` computes.

    Args:
        language: the model.
        num_tokens: of the packed row.
        num_visual_tokens: of the row; one is read where there is none.
    """
    width, size = language.num_attention_heads * language.head_dim, language.hidden_size
    linear = 2 * num_tokens * (4 * size * width + 3 * size * language.ffn_hidden_size)
    return linear + 2 * 2 * num_tokens * max(1, num_visual_tokens) * width


def num_gated_layers(architecture: Architecture) -> int:
    """Decoder layers that read the images."""
    interval = architecture.gate_interval
    return -(-architecture.language.num_layers // interval) if interval else 0


def layer_flops(
    architecture: Architecture, lengths: Sequence[int], num_visual_tokens: int, causal_half: bool = False
) -> float:
    """Forward FLOPs of a decoder layer on a packed row, a mean over the layers: some may read images, others not."""
    language = architecture.language
    flops = float(decoder_layer_flops(language, lengths, causal_half))
    num_gated = num_gated_layers(architecture)
    if num_gated:
        flops += num_gated / language.num_layers * gated_layer_flops(language, sum(lengths), num_visual_tokens)
    return flops


def language_flops(
    architecture: Architecture, lengths: Sequence[int], num_visual_tokens: int = 0, causal_half: bool = False
) -> int:
    """Forward FLOPs of the whole language model on a packed row."""
    language = architecture.language
    flops = language.num_layers * decoder_layer_flops(language, lengths, causal_half)
    num_gated = num_gated_layers(architecture)
    if num_gated:
        flops += num_gated * gated_layer_flops(language, sum(lengths), num_visual_tokens)
    return flops + head_flops(language, sum(lengths))
