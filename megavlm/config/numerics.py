"""What a recipe's precision means: types, which parts are in FP8, and what token counts are padded to."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from megavlm.config.schema import Recipe
from megavlm.config.stage_knobs import WORDLESS_STAGES
from megavlm.errors import use_error

FP8_PRECISIONS = ("fp8", "fp8_emulated")

# Tokens of a GEMM, in whose weight gradient they are what is summed over, by recipe: cuBLAS wants a multiple of 16, and
# blocks of MXFP8 are whole (megatron-core 0.16.1, fp8_utils.get_fp8_align_size).
_TOKENS_OF_A_RANK: Mapping[str, int] = MappingProxyType({"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32})
# The same where sequence parallelism gathers tokens in FP8: the part of each rank has whole blocks (Transformer Engine
# 2.11, pytorch/utils.py assert_dim_for_all_gather, and is_quantizable of each quantizer).
_TOKENS_OF_A_GATHERED_PART: Mapping[str, int] = MappingProxyType(dict(_TOKENS_OF_A_RANK) | {"blockwise": 128})


def compute_dtype(recipe: Recipe) -> Literal["fp32", "bf16", "fp16"]:
    """Type of weights and activations, whatever the operands of linear layers are rounded to."""
    precision = recipe.train.precision
    if precision == "fp8":
        return "bf16"
    if precision == "fp8_emulated":
        return recipe.fp8.fp8_emulated_dtype
    return precision


def fp8_recipes(recipe: Recipe) -> dict[str, str]:
    """FP8 recipe of each component that is in FP8 (`vision`, `projector`, `language`)."""
    if recipe.train.precision not in FP8_PRECISIONS:
        return {}
    fp8 = recipe.fp8
    chosen = {
        "vision": fp8.vit_fp8_recipe or fp8.fp8_recipe,
        "projector": fp8.aligner_fp8_recipe or fp8.fp8_recipe,
        "language": fp8.fp8_recipe,
    }
    return {name: one for name, one in chosen.items() if one != "none"}


def token_multiple(recipe: Recipe) -> int:
    """What the tokens that a rank holds of a row (its context and sequence-parallel part) are a multiple of."""
    chosen = fp8_recipes(recipe).get("language")
    if chosen is None:
        return 1
    return (_TOKENS_OF_A_GATHERED_PART if recipe.parallel.sequence_parallel else _TOKENS_OF_A_RANK)[chosen]


def row_multiples(recipe: Recipe) -> tuple[int, int]:
    """What a sample, and a whole packed row, are padded to a multiple of.

    That of a row is its whole length where rows have one length. Each context rank has two pieces of every sample, and
    of the segment that fills the row up; its tokens divide by the sequence-parallel ranks, and what each of these holds
    by what FP8 asks for.
    """
    parallel = recipe.parallel
    context = parallel.context_parallel_size
    sample = 2 * context if context > 1 else 1
    ranks = context * (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
    held = token_multiple(recipe)
    tensor = ranks // context
    row = math.lcm(sample * tensor, ranks * held)
    if recipe.data.pad_to_packing_length:
        row = -(-(recipe.data.packing_length or recipe.data.max_length) // row) * row
    return sample, row


def check_numerics(recipe: Recipe) -> None:
    """Check the section `fp8`, the loss scale and fused products against train.precision and the stage.

    Raises:
        UseError: the first contradiction found.
    """
    train, fp8, optimizer = recipe.train, recipe.fp8, recipe.optimizer
    _check_fusions(recipe)
    if optimizer.loss_scale and train.precision != "fp16":
        raise use_error(
            "optimizer.loss_scale",
            f"{optimizer.loss_scale} with train.precision {train.precision}",
            "0: only fp16 has too little range for unscaled gradients",
            "set optimizer.loss_scale=0 or train.precision=fp16",
        )
    if optimizer.min_loss_scale > optimizer.initial_loss_scale:
        raise use_error(
            "optimizer.min_loss_scale",
            optimizer.min_loss_scale,
            f"at most optimizer.initial_loss_scale {optimizer.initial_loss_scale}",
            "lower it",
        )
    if train.precision == "fp8" and recipe.model.backend != "te":
        raise use_error(
            "train.precision",
            f"fp8 with model.backend {recipe.model.backend}",
            "model.backend te: FP8 matrix products are Transformer Engine's",
            "set model.backend=te, or train.precision=fp8_emulated to study a recipe without a GPU",
        )
    if train.precision == "fp8":
        _check_transformer_engine(recipe)
    if train.precision == "fp8_emulated" and recipe.model.backend != "torch":
        raise use_error(
            "train.precision",
            f"fp8_emulated with model.backend {recipe.model.backend}",
            "model.backend torch, whose linear layers can be emulated",
            "set model.backend=torch or train.precision=fp8",
        )
    if fp8.fp8_param_gather and train.precision != "fp8":
        raise use_error(
            "fp8.fp8_param_gather",
            f"true with train.precision {train.precision}",
            "train.precision fp8: an emulation keeps whole weights",
            "set fp8.fp8_param_gather=false",
        )
    if fp8.first_last_layers_bf16 and "delayed" in fp8_recipes(recipe).values():
        raise use_error(
            "fp8.first_last_layers_bf16",
            "true with the recipe delayed",
            "another recipe: Megatron-Core keeps one history for all layers",
            "set fp8.fp8_recipe=tensorwise or fp8.first_last_layers_bf16=false",
        )


def _check_transformer_engine(recipe: Recipe) -> None:
    """What Megatron-Core's use of Transformer Engine leaves out: it enters FP8 around transformer layers, whole."""
    fp8, parallel = recipe.fp8, recipe.parallel
    if "projector" in fp8_recipes(recipe):
        raise use_error(
            "fp8.aligner_fp8_recipe",
            fp8.aligner_fp8_recipe or f"{fp8.fp8_recipe} (fp8_recipe)",
            "none: with train.precision fp8 only transformer layers are in FP8",
            "set fp8.aligner_fp8_recipe=none",
        )
    if fp8.fp8_exempt:
        raise use_error(
            "fp8.fp8_exempt",
            f"`{fp8.fp8_exempt[0]}` with train.precision fp8",
            "nothing: Transformer Engine's layers are in FP8 whole; modules are exempt with fp8_emulated only",
            "set fp8.first_last_layers_bf16=true, or leave it out",
        )
    recomputes_norms = parallel.recompute_granularity == "selective" and "layernorm" in parallel.recompute_modules
    if recomputes_norms and "delayed" in fp8_recipes(recipe).values():
        raise use_error(
            "parallel.recompute_modules",
            "layernorm with the recipe delayed",
            "another recipe, or no norms: Megatron-Core refuses them together",
            "set fp8.fp8_recipe=tensorwise, or remove layernorm",
        )


def _check_fusions(recipe: Recipe) -> None:
    if recipe.model.cross_entropy_loss_fusion and recipe.train.stage in WORDLESS_STAGES:
        raise use_error(
            "model.cross_entropy_loss_fusion",
            f"true with train.stage {recipe.train.stage}",
            "false: the model has scores or embeddings in place of logits",
            "set model.cross_entropy_loss_fusion=false",
        )
    if recipe.parallel.gradient_accumulation_fusion and recipe.train.precision == "fp8_emulated":
        raise use_error(
            "parallel.gradient_accumulation_fusion",
            "true with train.precision fp8_emulated",
            "false: emulated products have no kernels",
            "set parallel.gradient_accumulation_fusion=false",
        )
