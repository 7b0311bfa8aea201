"""Bytes that autograd keeps of the vision encoder for some images, with the layers of the `torch` backend.

See `activations.py` for what is counted.

Letters in formulas: e bytes of an element, P patches, S tokens of the tower (patches and class tokens).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megavlm.config.inputs import Grid
from megavlm.config.tuning import Tuning
from megavlm.models.architecture import Architecture, ConnectorArchitecture
from megavlm.planner.activations import (
    FP32_BYTES,
    INDEX_BYTES,
    Attention,
    Kept,
    Recompute,
    attention_bytes,
    extra_bytes,
    layer_bytes,
    rms_norm,
)
from megavlm.planner.families import tower_traits
from megavlm.planner.flops import window_lengths
from megavlm.planner.resampler_activations import Queried, resampler
from megavlm.planner.tuned import LayerKept, Tuned, connector_matrices, layer_kept, tower_matrices


@dataclass(frozen=True)
class Images:
    """Images that a rank encodes together, and how.

    Attributes:
        grids: (frames, rows, columns) of each, in patches.
        tensor: tensor-parallel ranks of the encoder.
        element_bytes: 4 in fp32, 2 in bf16.
        tuned: how everything learns.
        trains_tower: whether something in it does; a frozen tower keeps nothing.
        trains_connectors: with a frozen tower, these begin what is differentiated.
    """

    grids: tuple[Grid, ...]
    tuned: Tuned
    tensor: int = 1
    element_bytes: int = FP32_BYTES
    trains_tower: bool = True
    trains_connectors: bool = True

    @property
    def patches(self) -> int:
        """P."""
        return sum(math.prod(grid[:3]) for grid in self.grids)


def _segments(architecture: Architecture, grids: Sequence[Grid]) -> tuple[int, ...]:
    """Tokens of each frame: a segment of the tower's attention."""
    extra = int(architecture.vision.class_token)
    return tuple(rows * columns + extra for frames, rows, columns, *_ in grids for _ in range(frames))


def _windows(architecture: Architecture, grids: Sequence[Grid]) -> tuple[int, ...]:
    """Tokens of each window."""
    return tuple(
        length
        for frames, rows, columns, *_ in grids
        for _ in range(frames)
        for length in window_lengths(architecture.vision, rows, columns)
    )


def tower_layers(architecture: Architecture, images: Images, recompute: Recompute, layers: range) -> list[Kept]:
    """Some layers of the tower, without full recompute."""
    vision, tuned, matrices = architecture.vision, images.tuned, tower_matrices(architecture)
    kinds: dict[tuple[bool, Tuning], Kept] = {}
    each = []
    for number in layers:
        in_windows = vision.window > 0 and number not in vision.full_attention_layers
        kind = in_windows, tuned.of("vision", number)
        if kind not in kinds:
            learns = layer_kept(tuned, "vision", number, matrices, images.tensor)
            kinds[kind] = _tower_layer(architecture, images, recompute, in_windows, learns)
        each.append(kinds[kind])
    return each


def _tower_layer(
    architecture: Architecture, images: Images, recompute: Recompute, in_windows: bool, learns: LayerKept
) -> Kept:
    """A layer whose attention stays in windows, or in frames."""
    vision, traits, e = architecture.vision, tower_traits(architecture), images.element_bytes
    lengths = (_windows if in_windows else _segments)(architecture, images.grids)
    tokens, size = sum(lengths), vision.hidden_size
    width = tokens * size * e
    attention = Attention(
        lengths=lengths,
        tokens=tokens,
        query=size / images.tensor,
        key=size / images.tensor,
        num_heads=vision.num_attention_heads / images.tensor,
        element_bytes=e,
        mixed=3 * size / images.tensor,
        own_query_key=traits.rotary or vision.qk_norm_epsilon is not None,
        num_virtual_tokens=learns.num_virtual_tokens,
    )
    rotary = 4 * tokens * size // vision.num_attention_heads * e if traits.rotary else 0
    # of queries and of keys a copy in fp32, the normalised ones, and each token's root
    heads_norms = 2 * tokens * (size / images.tensor * (FP32_BYTES + learns.norms * e) + FP32_BYTES)
    if vision.normalization == "RMSNorm":
        norm = rms_norm(tokens * size, tokens, e)
        redone_norm = norm - width  # its input is the kept one
    else:
        redone_norm = 2 * tokens * e
        norm = width + redone_norm
    ffn = tokens * vision.ffn_hidden_size / images.tensor * e
    activation_copies = 2 if vision.activation == "quick_gelu" else 1  # its argument and the sigmoid
    gated = 2 if vision.activation == "silu" else 4  # SwiGLU keeps both halves alone
    heads = rotary + extra_bytes(learns.at("qkv"), tokens, tokens, e)
    heads += 2 * width if vision.layer_scale and learns.norms else 0
    heads += heads_norms if vision.qk_norm_epsilon is not None else 0
    core = attention_bytes(attention, recompute, mixed_is_kept=False)
    if not learns.at("proj").takes:
        shared = attention.is_even and not recompute.attention
        core = Kept(core.bytes - (0 if shared else width / images.tensor), core.redone_bytes)
    mlp = ((gated if vision.gated_mlp else activation_copies) + learns.at("fc2").takes) * ffn
    mlp += sum(extra_bytes(learns.at(place), tokens, tokens, e) for place in ("fc1", "fc2"))
    return layer_bytes(
        recompute,
        norm=norm,
        redone_norm=redone_norm,
        hidden=width,
        linear_in=learns.at("qkv").takes * width,
        heads=heads,
        core=Kept(core.bytes + extra_bytes(learns.at("proj"), tokens, tokens, e), core.redone_bytes),
        mlp=mlp,
        mlp_in=learns.at("fc1").takes * width,
    )


def patch_embedding(architecture: Architecture, images: Images) -> float:
    """The patches, and what the positions (and a norm behind them) keep."""
    vision, traits, e = architecture.vision, tower_traits(architecture), images.element_bytes
    kept = float(images.patches * vision.patch_channels * e)
    if traits.interpolated:
        kept += 4 * images.patches * (INDEX_BYTES + FP32_BYTES)
    if vision.window:  # the order that puts windows together
        kept += images.patches * INDEX_BYTES
    if vision.pre_norm:
        kept += sum(_segments(architecture, images.grids)) * (vision.hidden_size + 2) * e
    return kept


def connectors(architecture: Architecture, images: Images, taps_last_layer: bool) -> float:
    """All connectors.

    Args:
        architecture: of the model.
        images: what is encoded.
        taps_last_layer: the last layer's output is tapped too, and so kept by two norms as one.
    """
    vision, e = architecture.vision, images.element_bytes
    connector = architecture.connector
    if connector is not None and connector.num_queries:
        num_queries = connector.num_queries * sum(grid[0] for grid in images.grids)
        return resampler(architecture, connector, Queried(images.patches, num_queries, e, images.trains_connectors))
    if connector is not None and connector.kind == "pixel_shuffle_mlp":
        return _pixel_shuffle_mlp(architecture, connector, images)
    merge = vision.merge_size**2
    merged = vision.hidden_size * merge
    middle = merged if merge > 1 else architecture.language.hidden_size
    tokens = images.patches // merge
    inputs, beside = _connector_inputs(architecture, images, merged, middle / images.tensor, tokens)
    linears = tokens * (inputs + middle / images.tensor) * e + beside
    if not tower_traits(architecture).merger_norm:
        return linears
    if vision.normalization == "RMSNorm":
        main = rms_norm(images.patches * vision.hidden_size, images.patches, e) + linears
    else:
        main = (images.patches * (vision.hidden_size + 2)) * e + linears
    if vision.window:  # the order that takes them apart again
        main += images.patches * INDEX_BYTES
    deepstack = architecture.num_deepstack * (linears + 2 * tokens * e)
    if not images.trains_tower:  # the tapped states are kept by nobody else
        deepstack += (architecture.num_deepstack - taps_last_layer) * images.patches * vision.hidden_size * e
    return main + deepstack


def _pixel_shuffle_mlp(architecture: Architecture, connector: ConnectorArchitecture, images: Images) -> float:
    """The patches in another order, which the norm keeps; its output; the MLP."""
    e, width = images.element_bytes, architecture.vision.hidden_size
    tokens = images.patches / connector.merge_size**2
    middle = architecture.language.hidden_size / images.tensor
    inputs, beside = _connector_inputs(architecture, images, width * connector.merge_size**2, middle, tokens)
    order = architecture.vision.num_positions * INDEX_BYTES if images.trains_tower else 0
    return (images.patches * width + 2 * tokens + tokens * (inputs + middle)) * e + order + beside


def _connector_inputs(
    architecture: Architecture, images: Images, merged: float, middle: float, tokens: float
) -> tuple[float, float]:
    """Of both linears of a connector: elements a token that they keep as inputs, and bytes of adapters at them."""
    learns = layer_kept(images.tuned, "projector", None, connector_matrices(architecture), images.tensor)
    first, second = learns.at("fc1"), learns.at("fc2")
    beside = sum(extra_bytes(one, tokens, tokens, images.element_bytes) for one in (first, second))
    return first.takes * merged + second.takes * middle, beside


def encoder(
    architecture: Architecture,
    images: Images,
    recompute: Recompute,
    layers: range,
    first: bool,
    last: bool,
) -> Kept:
    """An encoder, or one of its stages, on some images.

    Args:
        architecture: of the model.
        images: what is encoded; without any nothing is kept.
        recompute: `full` checkpoints every layer, whatever the language model's method is.
        layers: numbers of the tower's layers on this rank.
        first: the rank embeds the patches.
        last: it has the connectors.
    """
    if not images.patches or not (images.trains_tower or images.trains_connectors):
        return Kept(0.0)
    vision, tuned = architecture.vision, images.tuned
    taps_last = vision.num_computed_layers - 1 in vision.deepstack_layers
    behind = connectors(architecture, images, taps_last) if last else 0.0
    if not images.trains_tower:
        return Kept(behind)
    kept_layers = tower_layers(architecture, images, recompute, layers)
    width = sum(_segments(architecture, images.grids)) * vision.hidden_size * images.element_bytes
    # states that were tapped by earlier stages come with the hidden state in one tensor; the connectors copy them
    num_tapped = sum(number < layers.start for number in vision.deepstack_layers)
    before = 0.0 if first else num_tapped * width * (2 if last else 1)
    if first and tuned.of("vision", None).method == "full":
        before = patch_embedding(architecture, images)
    if recompute.full:
        kept = before + len(layers) * width + behind
        # the norm keeps the checkpoint itself; the connectors are through by then
        return Kept(kept, max(0.0, *(layer.bytes - width - behind for layer in kept_layers)))
    redone = max(0.0, *(layer.redone_bytes - behind for layer in kept_layers))
    if not first or before or recompute.modules:
        return Kept(before + sum(layer.bytes for layer in kept_layers) + behind, redone)
    # the first layers keep nothing until one learns, whose first norm is frozen; recompute asks for all gradients
    learning = [tuned.of("vision", number).method != "frozen" for number in layers]
    start = learning.index(True) if any(learning) else len(learning)
    own = sum(layer.bytes for layer in kept_layers[start:])
    norm = width + 2 * width // vision.hidden_size
    if vision.normalization == "RMSNorm":
        tokens = width // (vision.hidden_size * images.element_bytes)
        norm = int(rms_norm(tokens * vision.hidden_size, tokens, images.element_bytes))
    return Kept(max(0.0, own - (norm if any(learning) else 0)) + behind, redone)
