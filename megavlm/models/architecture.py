"""What a model is made of, read from a Hugging Face config, before anything is built. Plain data."""

from dataclasses import dataclass

from megavlm.config.inputs import InputSpec


@dataclass(frozen=True)
class LanguageArchitecture:
    """A decoder-only language model (RMSNorm, SwiGLU, RoPE, GQA)."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    norm_epsilon: float
    vocab_size: int
    max_positions: int
    rotary_base: float
    tied_embeddings: bool
    qk_norm: bool = False
    qkv_bias: bool = False
    mrope_section: tuple[int, int, int] | None = None
    """Rotary frequencies per (temporal, height, width) axis; None: one axis."""
    mrope_interleaved: bool = False
    """True: axes alternate (Qwen3-VL); False: one block of frequencies after the other (Qwen2.5-VL)."""


@dataclass(frozen=True)
class VisionArchitecture:
    """A vision transformer and the connector behind it; fields that a family does not have stay at their default."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    activation: str
    norm_epsilon: float
    patch_channels: int
    merge_size: int
    num_positions: int
    """Rows of the learned position table, without a class token."""
    deepstack_layers: tuple[int, ...] = ()
    """ViT layers whose output also feeds the language model's first layers (Qwen3-VL)."""
    feature_layer: int = -1
    """Which hidden state is the feature: -1 after the last layer, -2 the one before (LLaVA-1.5)."""

    @property
    def num_computed_layers(self) -> int:
        """Layers up to the feature; later ones are carried along for export only."""
        return self.num_layers + 1 + self.feature_layer


@dataclass(frozen=True)
class Architecture:
    """A vision-language model."""

    family: str
    vision: VisionArchitecture
    language: LanguageArchitecture
    inputs: InputSpec

    @property
    def num_deepstack(self) -> int:
        """Features beside the embedding that travel with every visual token."""
        return len(self.vision.deepstack_layers)
