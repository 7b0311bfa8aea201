"""Bytes that autograd keeps of gated cross-attention (`models/gated.py`), with the layers of the `torch` backend.

See `activations.py` for what is counted. This attention keeps its probabilities: it is not one of the fused ones,
since which image a token sees is a mask.
"""

from megavlm.models.architecture import LanguageArchitecture
from megavlm.planner.activations import FP32_BYTES, Row, extra_bytes, rms_norm
from megavlm.planner.tuned import LEARNS, LayerKept


def cross_bytes(language: LanguageArchitecture, row: Row, learns: LayerKept = LEARNS) -> float:
    """What the cross-attention and the MLP in front of a decoder layer keep.

    Args:
        language: the model.
        row: a microbatch; its visual tokens are read, all of them by every token, and then masked.
        learns: how; where there are adapters, those of the three linears in front of the attention are alike.
    """
    e, held, tokens = row.element_bytes, row.held_tokens, row.tokens
    visual = max(1, row.num_visual_tokens)  # a row without images reads one token that nobody sees
    size, heads = language.hidden_size, language.num_attention_heads / row.tensor
    width = heads * language.head_dim
    hidden = held * size * e
    norms = 2 * rms_norm(held * size, held, e)
    inputs = (learns.at("qkv").takes + learns.at("fc1").takes) * hidden
    # scaled queries and keys, values, and the probabilities: in fp32, as torch computes what no kernel fuses
    attention = (tokens * width + 2 * visual * width + heads * tokens * visual) * FP32_BYTES
    projection = learns.at("proj").takes * tokens * width * e + tokens
    mlp = (2 + learns.at("fc2").takes) * tokens * language.ffn_hidden_size / row.tensor * e
    # what keys and values are made of are the hidden states of both slots; what learned gates multiply is kept as well
    slots = 2 * (learns.at("qkv").takes + learns.norms) * hidden
    beside = sum(extra_bytes(learns.at(place), tokens, tokens, e) for place in ("fc1", "fc2", "proj"))
    beside += 3 * extra_bytes(learns.at("qkv"), tokens, tokens, e)
    return slots + norms + inputs + attention + projection + mlp + beside
