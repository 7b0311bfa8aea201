"""What layout checks need to know of a model; `models/facts.py` reads it off an architecture."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelFacts:
    """The sizes that a layout has to divide.

    Attributes:
        num_layers: decoder layers of the language model.
        num_attention_heads: its query heads.
        num_query_groups: its key-value heads.
        head_dim: channels of one head.
        ffn_hidden_size: inner width of its feed-forward.
        vision_num_layers: layers of the vision tower that are computed.
        vision_num_attention_heads: heads of the vision tower.
        vision_ffn_hidden_size: inner width of the vision tower's feed-forward.
        vocab_size: rows of the embedding table.
        max_positions: longest sequence, in tokens, that the language model was made for.
        num_experts: of a layer; 0: its feed-forward is dense.
        expert_ffn_hidden_size: inner width of an expert.
    """

    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    vision_num_layers: int
    vision_num_attention_heads: int
    vision_ffn_hidden_size: int
    vocab_size: int
    max_positions: int
    num_experts: int = 0
    expert_ffn_hidden_size: int = 0
