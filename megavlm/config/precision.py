"""FP8 in a recipe: the section `fp8`, by Megatron's names."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Fp8Config:
    """FP8 in linear layers; read where train.precision is fp8 or fp8_emulated.

    Embedding, output layer, norms, attention and the router of experts always stay in bf16.
    """

    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "delayed"
    """Where scales come from. `delayed`: one for a tensor, from its largest values in earlier steps. `tensorwise`: one
    for a tensor, from itself. `blockwise`: one for 1 x 128 numbers (of weights 128 x 128), powers of two. `mxfp8`: one
    for 32 numbers, powers of two (Blackwell)."""
    vit_fp8_recipe: Literal["", "none", "delayed", "tensorwise", "blockwise", "mxfp8"] = ""
    """Of the vision tower; empty: fp8_recipe; none: it is not in FP8."""
    aligner_fp8_recipe: Literal["", "none", "delayed", "tensorwise", "blockwise", "mxfp8"] = ""
    """Of the projector."""
    fp8_format: Literal["e4m3", "hybrid"] = "hybrid"
    """`hybrid`: gradients are E5M2 (more range), all else E4M3 (more digits); `e4m3`: everything is E4M3."""
    fp8_margin: int = 0
    """With `delayed`: scales are 2 ** margin smaller than what the largest values ask for."""
    fp8_amax_history_len: int = 1
    """With `delayed`: steps whose largest values are kept."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """With `delayed`: whether the last of them counts, or the largest."""
    first_last_layers_bf16: bool = False
    """The first and last layers of decoder and tower are not in FP8. Not with `delayed`, as in Megatron."""
    num_layers_at_start_in_bf16: int = 1
    num_layers_at_end_in_bf16: int = 1
    fp8_exempt: tuple[str, ...] = ()
    """Modules that are not in FP8: patterns of global names, e.g. `projector.*`, `*.linear_fc2`,
    `language.decoder.layers.[0-3].*`. A pattern that meets no linear layer is an error."""
    fp8_param_gather: bool = False
    """Weights are kept, and gathered over data ranks, in FP8 (train.precision fp8 only)."""
    fp8_emulated_dtype: Literal["bf16", "fp32"] = "bf16"
    """With fp8_emulated: what all but the operands is in; with fp32 nothing but FP8 rounds."""
