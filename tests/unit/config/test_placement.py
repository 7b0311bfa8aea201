"""Placements that cannot be are refused, with the knob's name and a fix."""

from typing import Any

import pytest

from megavlm.config.facts import ModelFacts
from megavlm.config.fit import validate_layout, validate_model
from megavlm.config.placement import check_placement
from megavlm.config.schema import DataConfig, ParallelConfig, Recipe, TrainConfig
from megavlm.errors import UseError

FACTS = ModelFacts(
    num_layers=4,
    num_attention_heads=8,
    num_query_groups=2,
    head_dim=16,
    ffn_hidden_size=128,
    vision_num_layers=4,
    vision_num_attention_heads=4,
    vision_ffn_hidden_size=64,
    vocab_size=512,
    max_positions=4096,
)
PP2 = {"pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("knobs", "parts"),
    [
        ({"vision_placement": "stage"}, ["vision_pipeline_model_parallel_size: got 1 of 1", "a pipeline of 2 or more"]),
        (
            PP2 | {"vision_placement": "stage", "vision_pipeline_model_parallel_size": 2},
            ["got 2 of 2 pipeline ranks", "at most 1"],
        ),
        (
            PP2 | {"vision_placement": "stage", "virtual_pipeline_model_parallel_size": 2},
            ["virtual_pipeline_model_parallel_size: got 2 with vision_placement stage"],
        ),
        ({"vision_placement": "bubble"}, ["got bubble with pipeline_model_parallel_size 1", "spread"]),
        (PP2 | {"vision_data_parallel_size": 2}, ["vision_data_parallel_size: got 2", "own_ranks"]),
        (PP2 | {"vision_max_live_microbatches": 2}, ["vision_max_live_microbatches: got 2", "bubble"]),
        (PP2 | {"vision_extra_microbatches_in_flight": 1}, ["vision_extra_microbatches_in_flight: got 1", "bubble"]),
        (
            PP2
            | {"vision_placement": "bubble", "virtual_pipeline_model_parallel_size": 2}
            | {"vision_extra_microbatches_in_flight": 1},
            ["vision_extra_microbatches_in_flight: got 1 with 2 model chunks", "remove it"],
        ),
        (PP2 | {"vision_recompute": True}, ["vision_recompute: got True", "spread or"]),
    ],
)
def test_knobs_that_do_not_belong_together(knobs: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UseError) as caught:
        check_placement(ParallelConfig(**knobs))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("placement", ["first_stage", "stage", "spread", "bubble", "own_ranks"])
def test_placements_of_a_pipeline_are_fine(placement: str) -> None:
    check_placement(ParallelConfig(**PP2, vision_placement=placement))


def test_more_encoder_stages_than_layers() -> None:
    parallel = ParallelConfig(
        pipeline_model_parallel_size=6, vision_placement="stage", vision_pipeline_model_parallel_size=5
    )
    with pytest.raises(UseError, match=r"vision_pipeline_model_parallel_size: got 5; expected at most the .* 4 layers"):
        validate_model(Recipe(parallel=parallel), FACTS)


def test_own_ranks_count_beside_the_language_models() -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=2,
        vision_placement="own_ranks",
        vision_data_parallel_size=2,
        vision_tensor_model_parallel_size=1,
    )
    recipe = Recipe(parallel=parallel, train=TrainConfig(global_batch_size=8))
    assert validate_layout(recipe, 2 + 4) == 2
    with pytest.raises(UseError, match="got 5 processes; expected a multiple of 2 .* and 2 for the encoder"):
        validate_layout(recipe, 5)
    with pytest.raises(UseError, match="got 2 encoders x tensor parallel 1 of 2 processes"):
        validate_layout(recipe, 2)


def test_packing_needs_a_sample_for_each_data_rank() -> None:
    recipe = Recipe(data=DataConfig(packing=True), train=TrainConfig(global_batch_size=3))
    assert validate_layout(recipe, 3) == 3
    with pytest.raises(UseError, match="global_batch_size: got 3; expected at least 4"):
        validate_layout(recipe, 4)
