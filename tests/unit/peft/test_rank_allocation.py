"""Ranks are given out where they are worth most, within the budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megavlm.config.peft import PeftConfig
from megavlm.config.schema import Recipe
from megavlm.config.tuning import tuning_plan
from megavlm.errors import UseError
from megavlm.peft.rank_allocation import LayerInformation, allocate_ranks, as_components


def layers_of(*pairs: tuple[float, int]) -> dict[tuple[str, int | None], LayerInformation]:
    return {("language", number): LayerInformation(*pair) for number, pair in enumerate(pairs)}


def test_ranks_are_proportional_to_information() -> None:
    layers = layers_of((3.0, 10), (1.0, 10), (2.0, 10))
    assert list(allocate_ranks(layers, 10 * 60, 64).values()) == [30, 10, 20]


def test_costly_layers_get_less() -> None:
    cheap, costly = allocate_ranks(layers_of((1.0, 10), (1.0, 40)), 10 * 40 + 40 * 10, 64).values()
    assert (cheap, costly) == (40, 10)


def test_what_a_full_layer_does_not_take_goes_to_others() -> None:
    assert list(allocate_ranks(layers_of((100.0, 10), (1.0, 10)), 10 * 20, 8).values()) == [8, 8]


def test_a_budget_below_the_least_is_said() -> None:
    with pytest.raises(UseError, match="at least 20, rank 1 for every layer"):
        allocate_ranks(layers_of((1.0, 10), (1.0, 10)), 19, 8)


@given(
    st.lists(st.tuples(st.floats(0, 1e3), st.integers(1, 50)), min_size=1, max_size=12),
    st.integers(0, 2000),
    st.integers(1, 40),
)
def test_the_budget_holds_and_nothing_more_fits(pairs: list[tuple[float, int]], extra: int, max_rank: int) -> None:
    layers = layers_of(*pairs)
    budget = sum(one.num_parameters for one in layers.values()) + extra
    ranks = allocate_ranks(layers, budget, max_rank)
    spent = sum(layers[layer].num_parameters * rank for layer, rank in ranks.items())
    assert spent <= budget and all(1 <= rank <= max_rank for rank in ranks.values())
    left = [one.num_parameters for layer, one in layers.items() if ranks[layer] < max_rank]
    assert all(cost > budget - spent for cost in left)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_written_for_a_recipe(use_rslora: bool) -> None:
    peft = PeftConfig(tuner_type="lora", lora_rank=4, lora_alpha=8.0, use_rslora=use_rslora)
    ranks: dict[tuple[str, int | None], int] = {("language", 0): 16, ("language", 1): 16, ("language", 2): 4}
    ranks[("projector", None)] = 2
    text = as_components(ranks, {"vision": True, "projector": False, "language": False}, peft)
    plan = tuning_plan(Recipe(peft=PeftConfig(components=text, use_rslora=use_rslora)))
    assert plan.of("vision", 0).method == "frozen"
    assert [plan.of("language", layer).rank for layer in (0, 1, 2)] == [16, 16, 4]
    assert plan.of("language", 3).method == "frozen" and plan.of("projector", None).rank == 2
    for layer in (0, 2):  # the scaling stays
        tuning = plan.of("language", layer)
        root = tuning.rank**0.5 if use_rslora else tuning.rank
        assert tuning.alpha / root == pytest.approx(8.0 / (4**0.5 if use_rslora else 4))
