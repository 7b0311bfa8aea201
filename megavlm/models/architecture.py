"""What a model is made of, read from a Hugging Face config, before anything is built. Plain data."""

from dataclasses import dataclass, field
from typing import Literal

from megavlm.config.inputs import InputSpec


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies that are stretched for contexts longer than those of pretraining.

    Attributes:
        kind: `linear` divides all by `factor`; `llama3` (Llama 3.1) and `yarn` divide slow ones, leave fast ones, and
            blend those between: llama3 by their turns, yarn by their number.
        factor: of stretching.
        low_frequency_factor: wavelengths above original_max_positions / this are slow (yarn's beta_slow).
        high_frequency_factor: wavelengths below original_max_positions / this are fast (yarn's beta_fast).
        original_max_positions: context length of pretraining, in tokens.
        attention_factor: what cosines and sines are multiplied by (yarn).
        truncate: whether the ends of yarn's ramp are whole numbers.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 1.0
    original_max_positions: int = 0
    attention_factor: float = 1.0
    truncate: bool = True

    def __repr__(self) -> str:
        """Fields that the kind reads: checkpoints are compared by this text, also those from before there was yarn."""
        names = ["kind", "factor", "low_frequency_factor", "high_frequency_factor", "original_max_positions"]
        names += ["attention_factor", "truncate"] if self.kind == "yarn" else []
        return f"RopeScaling({', '.join(f'{name}={vars(self)[name]!r}' for name in names)})"


@dataclass(frozen=True)
class ExpertsArchitecture:
    """A mixture of experts in place of every layer's MLP; softmax over the chosen ones.

    Attributes:
        num_experts: of a layer.
        top_k: experts that a token goes to.
        ffn_hidden_size: inner width of an expert.
    """

    num_experts: int
    top_k: int
    ffn_hidden_size: int


@dataclass(frozen=True)
class MaskHeadArchitecture:
    """A head for masks beside the output layer.

    Attributes:
        width: of the vectors that it multiplies.
        segment_token_id: of the token that stands for a mask.
    """

    width: int
    segment_token_id: int


Head = Literal["words", "scores", "embeddings", "matches"]
"""What a model ends in: an output layer over words, a reward model's scores, embeddings, or embeddings and whether a
text belongs to images."""


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
    rope_scaling: RopeScaling | None = None
    experts: ExpertsArchitecture | None = None
    has_score_head: bool = field(default=False, repr=False)
    """Of a reward model: one number a token in place of logits. Not in the text by which checkpoints are compared."""
    embedding_dim: int = field(default=0, repr=False)
    """Of an embedding model: so many numbers a token in place of logits; 0: it is none. Not in that text either."""
    has_match_head: bool = field(default=False, repr=False)
    """Of an embedding model that also tells whether a text belongs to images. Not in that text either."""
    mask_head: MaskHeadArchitecture | None = field(default=None, repr=False)
    """What tells the pixels of things, beside the logits; None: nothing does. Not in that text either."""

    @property
    def head(self) -> Head:
        """What stands behind the last layer."""
        if self.has_score_head:
            return "scores"
        if not self.embedding_dim:
            return "words"
        return "matches" if self.has_match_head else "embeddings"

    @property
    def shares_embeddings(self) -> bool:
        """Whether the output layer is the embedding."""
        return self.tied_embeddings and self.head == "words"


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
    class_token: bool = False
    """A token of its own in front of every frame's patches; it is dropped behind the last layer."""
    patch_bias: bool = False
    """Whether the patch embedding has a bias."""
    pre_norm: bool = False
    """A norm in front of the first layer (CLIP)."""
    carries_final_norm: bool = False
    """A norm behind the last layer, and layers behind the feature, are carried along for export (CLIP, SigLIP)."""
    carries_head: bool = False
    """So is an attention pooling head (SigLIP)."""
    layer_scale: bool = False
    """Branches are scaled channel by channel before they are added (InternViT)."""
    qkv_bias: bool = True
    qk_norm_epsilon: float | None = None
    """Of an RMSNorm over all heads of a query together, and one of a key (InternViT-6B); None: there is none."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    gated_mlp: bool = False
    window: int = 0
    """Attention stays inside windows of so many visual tokens (merged patches) a side; 0: inside frames."""
    full_attention_layers: tuple[int, ...] = ()
    """Layers that attend to whole frames although there are windows."""

    @property
    def num_computed_layers(self) -> int:
        """Layers up to the feature; later ones are carried along for export only."""
        return self.num_layers + 1 + self.feature_layer


@dataclass(frozen=True)
class ConnectorArchitecture:
    """A connector that is a choice of its own (composed models); fields that a kind does not have keep their default.

    Attributes:
        kind: `mlp` (two layers), `pixel_shuffle_mlp` (merge_size^2 neighbouring patches become one, then a norm and two
            layers), `perceiver` or `qformer` (learned queries), `gated_cross_attention` (a perceiver, whose visual
            tokens are read by layers of their own in the language model).
        num_queries: visual tokens of an image.
        depth: layers.
        hidden_size: width of a Q-Former.
        ffn_hidden_size: of a Q-Former's MLP.
        num_heads: of attention.
        num_key_value_heads: of a perceiver.
        head_dim: of a perceiver.
        cross_attention_frequency: a Q-Former, or the language model, reads the image in every so manieth layer.
        merge_size: neighbouring patches that become one, along each side.
        norm_epsilon: of its norms.
    """

    kind: Literal["mlp", "pixel_shuffle_mlp", "perceiver", "qformer", "gated_cross_attention"]
    num_queries: int = 0
    depth: int = 0
    hidden_size: int = 0
    ffn_hidden_size: int = 0
    num_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    cross_attention_frequency: int = 1
    merge_size: int = 1
    norm_epsilon: float = 1e-6


@dataclass(frozen=True)
class Architecture:
    """A vision-language model; `connector` only where that is not the family's own."""

    family: str
    vision: VisionArchitecture
    language: LanguageArchitecture
    inputs: InputSpec
    connector: ConnectorArchitecture | None = None

    @property
    def gate_interval(self) -> int:
        """Every so manieth decoder layer reads the images by gated cross-attention; 0: they stand in the row."""
        gated = self.connector is not None and self.connector.kind == "gated_cross_attention"
        return self.connector.cross_attention_frequency if gated and self.connector is not None else 0

    @property
    def num_deepstack(self) -> int:
        """Features beside the embedding that travel with every visual token."""
        return len(self.vision.deepstack_layers)
