"""Bytes that autograd keeps of connectors with learned queries (`models/resampler.py`).

See `activations.py` for what is counted.

Letters in formulas: e bytes of an element, P patches, Q queries of all images.
"""

from dataclasses import dataclass

from megavlm.models.architecture import Architecture, ConnectorArchitecture
from megavlm.planner.activations import rms_norm
from megavlm.planner.experts import FP32_BYTES


@dataclass(frozen=True)
class Queried:
    """Images that a connector with learned queries reads.

    Attributes:
        patches: P.
        queries: Q.
        element_bytes: e.
        trained: whether the connector learns; otherwise its linear layers keep no inputs.
    """

    patches: int
    queries: int
    element_bytes: int
    trained: bool


def resampler(architecture: Architecture, connector: ConnectorArchitecture, queried: Queried) -> float:
    """What the connector keeps."""
    tower, size = architecture.vision.hidden_size, architecture.language.hidden_size
    if connector.kind == "qformer":
        return _qformer(connector, queried, tower)
    middle = architecture.language.ffn_hidden_size
    return _perceiver(connector, queried, tower, middle, size)


def _gated_mlp(tokens: int, size_in: int, middle: int, queried: Queried) -> float:
    """Its input; the gate, what it becomes, the other branch, and their product."""
    learns = int(queried.trained)
    return tokens * (learns * size_in + (3 + learns) * middle) * queried.element_bytes


def _perceiver(connector: ConnectorArchitecture, queried: Queried, tower: int, middle: int, size: int) -> float:
    e, learns, patches, queries = queried.element_bytes, int(queried.trained), queried.patches, queried.queries
    wide, narrow = connector.num_heads * connector.head_dim, connector.num_key_value_heads * connector.head_dim
    seen = patches + queries
    shared = patches * size * e  # every layer's norm keeps the same patches
    context_norm = rms_norm(patches * size, patches, e) - shared
    latents_norm = rms_norm(queries * size, queries, e)
    linears_in = learns * (queries + seen) * size * e
    attention = (2 * queries * wide + 2 * seen * narrow) * e + queries * connector.num_heads * FP32_BYTES
    layer = context_norm + 2 * latents_norm + linears_in + attention + _gated_mlp(queries, size, 4 * size, queried)
    first = queries * size * e  # the learned queries themselves
    return _gated_mlp(patches, tower, middle, queried) + shared + connector.depth * layer - first + latents_norm


def _qformer(connector: ConnectorArchitecture, queried: Queried, tower: int) -> float:
    e, learns, patches, queries = queried.element_bytes, int(queried.trained), queried.patches, queried.queries
    width, depth = connector.hidden_size, connector.depth
    own = _post_norm_attention(connector, queried, queries)
    reading = _post_norm_attention(connector, queried, patches)
    mlp = queries * (learns * width + (1 + learns) * connector.ffn_hidden_size + width + 2) * e
    num_reading = -(-depth // connector.cross_attention_frequency)
    projection = learns * queries * width * e
    return depth * (own + mlp) + num_reading * reading + learns * patches * tower * e + projection


def _post_norm_attention(connector: ConnectorArchitecture, queried: Queried, read: int) -> float:
    """Attention of the queries to so many tokens, and the norm behind it."""
    e, queries, width = queried.element_bytes, queried.queries, connector.hidden_size
    linear_in = int(queried.trained) * queries * width
    inside = 2 * queries * width + 2 * read * width
    return (linear_in + inside + queries * (width + 2)) * e + queries * connector.num_heads * FP32_BYTES
