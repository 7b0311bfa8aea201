"""Bytes that autograd keeps of gated cross-attention (`models/gated.py`), with the layers of the `torch` backend.

See `activations.py` for what is counted. This attention keeps its probabilities: it is not one of the fused ones,
since which image a token sees is a mask.
"""

from megavlm.models.architecture import LanguageArchitecture
from megavlm.planner.activations import FP32_BYTES, Row, rms_norm


def cross_bytes(language: LanguageArchitecture, row: Row) -> float:
    """What the cross-attention and the MLP in front of a decoder layer keep.

    Args:
        language: the model.
        row: a microbatch; its visual tokens are read, all of them by every token, and then masked.
    """
    e, held, tokens, learns = row.element_bytes, row.held_tokens, row.tokens, int(row.trained)
    visual = max(1, row.num_visual_tokens)  # a row without images reads one token that nobody sees
    size, heads = language.hidden_size, language.num_attention_heads / row.tensor
    width = heads * language.head_dim
    hidden = held * size * e
    norm = rms_norm(held * size, held, e) + learns * hidden
    # scaled queries and keys, values, and the probabilities: in fp32, as torch computes what no kernel fuses
    attention = (tokens * width + 2 * visual * width + heads * tokens * visual) * FP32_BYTES
    projection = learns * tokens * width * e + tokens
    mlp = (2 + learns) * tokens * language.ffn_hidden_size / row.tensor * e
    # what keys and values are made of are the hidden states of both slots; what learned gates multiply is kept as well
    return learns * (2 + 2) * hidden + 2 * norm + attention + projection + mlp
