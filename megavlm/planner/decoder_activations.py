"""Bytes that autograd keeps of several decoder layers in a chunk, whole or but for checkpoints.

See `activations.py` for what is counted.
"""

from collections.abc import Sequence

from megavlm.models.architecture import Architecture
from megavlm.planner.activations import FP32_BYTES, Kept, Recompute, Row, decoder_layer, rms_norm, slots_before
from megavlm.planner.gated_activations import cross_bytes
from megavlm.planner.tuned import LayerKept, Tuned, decoder_matrices, expert_matrices, gated_matrices, layer_kept


def layer_learns(architecture: Architecture, tuned: Tuned, number: int, row: Row) -> LayerKept:
    """What learning makes autograd keep in a decoder layer; experts are in the MLP's place."""
    language = architecture.language
    kept = layer_kept(tuned, "language", number, decoder_matrices(language), row.tensor)
    if language.experts is None:
        return kept
    matrices = expert_matrices(language.experts, language.hidden_size)
    experts = layer_kept(tuned, "language", number, matrices, row.expert_ranks.tensor)
    return LayerKept(kept.norms, dict(kept.linears) | dict(experts.linears), kept.num_virtual_tokens)


def decoder_layers(
    architecture: Architecture,
    row: Row,
    layers: Sequence[int],
    recompute: Recompute,
    tuned: Tuned,
    differentiated: bool,
) -> Kept:
    """Some decoder layers in a chunk.

    Args:
        architecture: of the model.
        row: the microbatch.
        layers: their numbers.
        recompute: what is computed again; `full` checkpoints groups of layers.
        tuned: how everything learns.
        differentiated: whether there is a gradient for what the first of them takes; if there is none, layers in front
            of the first one that learns keep nothing. Recompute asks for one whenever something learns.
    """
    if not layers:
        return Kept(0.0)
    language, interval = architecture.language, architecture.gate_interval
    kinds = [tuned.of("language", number) for number in layers]
    some = dict(zip(kinds, layers, strict=True))  # of each kind one
    learns = {kind: layer_learns(architecture, tuned, number, row) for kind, number in some.items()}
    decoders = {kind: decoder_layer(language, row, recompute, learns[kind]) for kind in some}
    crosses = dict.fromkeys(some, 0.0)
    for kind, number in some.items() if interval else ():
        matrices = gated_matrices(language)
        crosses[kind] = cross_bytes(language, row, layer_kept(tuned, "language", number, matrices, row.tensor))
    each = [
        decoders[kind].bytes + (crosses[kind] if interval and number % interval == 0 else 0.0)
        for number, kind in zip(layers, kinds, strict=True)
    ]
    width = row.held_tokens * language.hidden_size * row.element_bytes
    if not recompute.full:
        redone = max(one.redone_bytes for one in decoders.values())
        if differentiated or recompute.modules:
            return Kept(sum(each), redone)
        first = next((index for index, kind in enumerate(kinds) if kind.method != "frozen"), len(kinds))
        # its norm is frozen, with nothing in front of it to differentiate
        held = row.held_tokens
        norm = rms_norm(held * language.hidden_size, held, row.element_bytes) if first < len(kinds) else 0.0
        return Kept(max(0.0, sum(each[first:]) - norm), redone)
    angles = sum(row.lengths) * language.head_dim * FP32_BYTES
    slots = [slots_before(architecture, number, row) for number in layers]
    number = min(recompute.num_layers, len(layers))
    starts = slots[::number] if recompute.method == "uniform" else slots[:number]
    # the first norm of a group keeps the checkpoint itself, where it is one hidden state
    shared = width if starts[-1] == 1 else 0.0
    if interval and learns[kinds[0]].at("qkv").takes and layers[0] % interval == 0:  # as do linears that read features
        shared = 2 * width
    if recompute.method == "block":  # the layers behind are through when the first ones are computed again
        behind = sum(each[number:])
        return Kept(sum(starts) * width + behind + angles, max(0.0, max(each[:number]) - shared - behind))
    most = max(sum(each[start : start + number]) for start in range(0, len(each), number))
    return Kept(sum(starts) * width + angles, most - shared)
