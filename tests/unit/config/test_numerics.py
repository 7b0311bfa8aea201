"""What a precision means for types, alignment and what it cannot go with."""

from math import lcm
from pathlib import Path

import pytest

from megavlm.config.load import recipe_from_dict
from megavlm.config.numerics import check_numerics, compute_dtype, fp8_recipes, row_multiples
from megavlm.config.schema import Recipe
from megavlm.errors import UseError


def recipe_of(**sections: dict[str, object]) -> Recipe:
    return recipe_from_dict(sections)


@pytest.mark.parametrize(
    ("precision", "fp8", "expected"),
    [
        ("fp32", {}, "fp32"),
        ("bf16", {}, "bf16"),
        ("fp16", {}, "fp16"),
        ("fp8", {"fp8_emulated_dtype": "fp32"}, "bf16"),
        ("fp8_emulated", {}, "bf16"),
        ("fp8_emulated", {"fp8_emulated_dtype": "fp32"}, "fp32"),
    ],
)
def test_what_everything_but_operands_is_in(precision: str, fp8: dict[str, object], expected: str) -> None:
    assert compute_dtype(recipe_of(train={"precision": precision}, fp8=fp8)) == expected


def test_components_have_recipes_of_their_own() -> None:
    fp8 = {"fp8_recipe": "mxfp8", "vit_fp8_recipe": "tensorwise", "aligner_fp8_recipe": "none"}
    assert fp8_recipes(recipe_of(train={"precision": "bf16"}, fp8=fp8)) == {}
    found = fp8_recipes(recipe_of(train={"precision": "fp8_emulated"}, fp8=fp8))
    assert found == {"vision": "tensorwise", "language": "mxfp8"}
    assert set(fp8_recipes(recipe_of(train={"precision": "fp8_emulated"})).values()) == {"delayed"}


@pytest.mark.parametrize(
    ("precision", "fp8_recipe", "tensor", "sequence", "context", "expected"),
    [
        ("bf16", "mxfp8", 1, False, 1, (1, 1)),
        ("bf16", "mxfp8", 2, False, 1, (1, 1)),
        ("bf16", "mxfp8", 2, True, 1, (1, 2)),
        ("bf16", "mxfp8", 2, True, 4, (8, 16)),
        ("fp8", "delayed", 1, False, 1, (1, 16)),
        ("fp8", "tensorwise", 4, False, 1, (1, 16)),
        ("fp8", "tensorwise", 4, True, 1, (1, 64)),
        ("fp8_emulated", "mxfp8", 1, False, 1, (1, 32)),
        ("fp8", "mxfp8", 4, True, 2, (4, 256)),
        ("fp8", "mxfp8", 2, False, 3, (6, 96)),
        ("fp8", "blockwise", 8, False, 1, (1, 16)),
        ("fp8", "blockwise", 8, True, 1, (1, 1024)),
        ("fp8", "blockwise", 8, True, 2, (4, 2048)),
    ],
)
def test_rows_are_padded_to_what_their_ranks_need(
    precision: str, fp8_recipe: str, tensor: int, sequence: bool, context: int, expected: tuple[int, int]
) -> None:
    parallel = {
        "tensor_model_parallel_size": tensor,
        "sequence_parallel": sequence,
        "context_parallel_size": context,
    }
    recipe = recipe_of(train={"precision": precision}, parallel=parallel, fp8={"fp8_recipe": fp8_recipe})
    assert row_multiples(recipe) == expected


@pytest.mark.parametrize("context", [1, 2, 3, 4])
@pytest.mark.parametrize("tensor", [1, 2, 3, 8])
@pytest.mark.parametrize("fp8_recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_each_rank_has_whole_blocks(fp8_recipe: str, tensor: int, context: int) -> None:
    """Whatever is packed: the row's tokens of a context rank, and of a sequence-parallel rank in it."""
    parallel = {
        "tensor_model_parallel_size": tensor,
        "sequence_parallel": tensor > 1,
        "context_parallel_size": context,
    }
    recipe = recipe_of(train={"precision": "fp8"}, parallel=parallel, fp8={"fp8_recipe": fp8_recipe})
    sample, row = row_multiples(recipe)
    needed = {"delayed": 16, "tensorwise": 16, "blockwise": 128 if tensor > 1 else 16, "mxfp8": 32}[fp8_recipe]
    assert row % sample == 0 and row % (context * tensor * needed) == 0
    assert row == lcm(sample * tensor, context * tensor * needed)  # and no more than that


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"train": {"precision": "fp8"}}, ["train.precision", "model.backend te", "fp8_emulated"]),
        (
            {"train": {"precision": "fp8_emulated"}, "model": {"backend": "te"}},
            ["train.precision", "model.backend torch"],
        ),
        ({"optimizer": {"loss_scale": 8.0}}, ["optimizer.loss_scale", "8.0 with train.precision bf16"]),
        ({"optimizer": {"min_loss_scale": 1e6}}, ["optimizer.min_loss_scale", "65536"]),
        (
            {"train": {"precision": "fp8_emulated"}, "fp8": {"fp8_param_gather": True}},
            ["fp8.fp8_param_gather", "train.precision fp8"],
        ),
        (
            {"train": {"precision": "fp8"}, "model": {"backend": "te"}},
            ["fp8.aligner_fp8_recipe", "delayed (fp8_recipe)", "none"],
        ),
        (
            {
                "train": {"precision": "fp8"},
                "model": {"backend": "te"},
                "fp8": {"aligner_fp8_recipe": "none", "fp8_exempt": ["*.linear_fc2"]},
            },
            ["fp8.fp8_exempt", "fp8_emulated"],
        ),
        (
            {
                "train": {"precision": "fp8"},
                "model": {"backend": "te"},
                "fp8": {"aligner_fp8_recipe": "none"},
                "parallel": {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
            },
            ["parallel.recompute_modules", "layernorm with the recipe delayed"],
        ),
        (
            {"train": {"precision": "fp8_emulated"}, "fp8": {"first_last_layers_bf16": True}},
            ["fp8.first_last_layers_bf16", "delayed", "tensorwise"],
        ),
    ],
)
def test_contradictions(sections: dict[str, dict[str, object]], parts: list[str]) -> None:
    with pytest.raises(UseError) as error:
        check_numerics(recipe_of(**sections))
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


def test_every_recipe_of_real_size_has_rows_that_hold_a_multiple() -> None:
    """A row of packing_length tokens needs no padding beyond it."""
    folder = Path(__file__).resolve().parents[3] / "examples" / "recipes"
    from megavlm.config.load import load_recipe

    for path in folder.glob("*.yaml"):
        recipe = load_recipe(path)
        if recipe.data.packing:
            assert (recipe.data.packing_length or recipe.data.max_length) % row_multiples(recipe)[1] == 0, path.stem
