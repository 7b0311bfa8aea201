"""Bytes that autograd keeps of several decoder layers in a chunk, whole or but for checkpoints.

See `activations.py` for what is counted.
"""

from collections.abc import Sequence

from megavlm.models.architecture import Architecture
from megavlm.planner.activations import FP32_BYTES, Kept, Recompute, Row, decoder_layer, slots_before
from megavlm.planner.gated_activations import cross_bytes


def decoder_layers(architecture: Architecture, row: Row, layers: Sequence[int], recompute: Recompute) -> Kept:
    """Some decoder layers in a chunk.

    Args:
        architecture: of the model.
        row: the microbatch.
        layers: their numbers.
        recompute: what is computed again; `full` checkpoints groups of layers.
    """
    if not layers:
        return Kept(0.0)
    language, interval = architecture.language, architecture.gate_interval
    layer = decoder_layer(language, row, recompute)
    cross = cross_bytes(language, row) if interval else 0.0
    each = [layer.bytes + (cross if interval and number % interval == 0 else 0.0) for number in layers]
    if not recompute.full:
        return Kept(sum(each), layer.redone_bytes)
    width = row.held_tokens * language.hidden_size * row.element_bytes
    angles = sum(row.lengths) * language.head_dim * FP32_BYTES
    slots = [slots_before(architecture, number, row) for number in layers]
    number = min(recompute.num_layers, len(layers))
    starts = slots[::number] if recompute.method == "uniform" else slots[:number]
    # the first norm of a group keeps the checkpoint itself, where it is one hidden state
    shared = width if starts[-1] == 1 else 0.0
    if interval and row.trained and layers[0] % interval == 0:  # as do the linear layers that read features
        shared = 2 * width
    if recompute.method == "block":  # the layers behind are through when the first ones are computed again
        behind = sum(each[number:])
        return Kept(sum(starts) * width + behind + angles, max(0.0, max(each[:number]) - shared - behind))
    most = max(sum(each[start : start + number]) for start in range(0, len(each), number))
    return Kept(sum(starts) * width + angles, most - shared)
