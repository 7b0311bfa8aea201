"""From an architecture to what layout checks need to know of it."""

from megavlm.config.facts import ModelFacts
from megavlm.models.architecture import Architecture


def facts_of(architecture: Architecture) -> ModelFacts:
    """The sizes that a layout has to divide."""
    language, vision = architecture.language, architecture.vision
    experts = language.experts
    return ModelFacts(
        num_layers=language.num_layers,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.num_query_groups,
        head_dim=language.head_dim,
        ffn_hidden_size=language.ffn_hidden_size,
        vision_num_layers=vision.num_computed_layers,
        vision_num_attention_heads=vision.num_attention_heads,
        vision_ffn_hidden_size=vision.ffn_hidden_size,
        vocab_size=language.vocab_size,
        max_positions=language.max_positions,
        num_experts=0 if experts is None else experts.num_experts,
        expert_ffn_hidden_size=0 if experts is None else experts.ffn_hidden_size,
    )
