"""The search finds what playing every layout finds; its bounds are bounds; what it writes is a recipe."""

from collections import Counter

import pytest
import yaml

from megavlm.config.fit import validate_layout, validate_model
from megavlm.config.load import recipe_to_dict
from megavlm.config.placement import check_placement
from megavlm.errors import UseError
from megavlm.models.facts import facts_of
from megavlm.parallel.topology import topology_of
from megavlm.planner.layouts import layouts, space_of
from megavlm.planner.page import block, page
from megavlm.planner.plans import bounded, describe, play, recipe_of
from megavlm.planner.search import SPLIT_GAIN, search
from megavlm.planner.splits import better_split
from tests.unit.planner.builders import ARCHITECTURE, EXPERTS, make_problem

PROBLEMS = {
    "packs": {},
    "samples": {"packing": False},
    "frozen tower": {"freeze_vit": True},
    "little memory": {"memory_gb": 7.0},
    "eight GPUs": {"num_gpus": 8, "seed": 3},
    "experts": {"architecture": EXPERTS},
}


def all_candidates(problem):
    space = space_of(problem.recipe, problem.num_gpus, problem.hardware.gpus_per_node)
    return space, bounded(problem, layouts(space, problem.workload.architecture, problem.recipe, Counter()))


@pytest.mark.parametrize("name", PROBLEMS)
def test_finds_the_best_of_all_and_bounds_are_bounds(name: str) -> None:
    problem = make_problem(**PROBLEMS[name])
    space, candidates = all_candidates(problem)
    assert {one.layout.placement for one in candidates} == {"first_stage", "stage", "spread", "bubble", "own_ranks"}
    plans = [play(problem, one) for one in candidates[:: 1 if problem.num_gpus < 8 else 7]]
    for one, plan in zip(candidates[:: 1 if problem.num_gpus < 8 else 7], plans, strict=True):
        assert plan.step_s >= one.bound_s * (1 - 1e-9), describe(one.layout)
    limit = problem.hardware.usable_memory_bytes
    played = zip(plans, candidates[:: 1 if problem.num_gpus < 8 else 7], strict=True)
    fitting = sorted(((plan, one) for plan, one in played if plan.memory.total <= limit), key=lambda one: one[0].step_s)
    found = search(problem, space)
    assert found.plans[0].step_s <= fitting[0][0].step_s * (1 + 1e-9)
    if problem.num_gpus < 8:  # the best ones, and those that another split of their layers may bring among them
        num_best = len(found.plans)
        near_s = fitting[num_best - 1][0].step_s * (1 + SPLIT_GAIN)
        expected = sorted(better_split(problem, one, plan).step_s for plan, one in fitting if plan.step_s <= near_s)
        assert [plan.step_s for plan in found.plans] == pytest.approx(expected[:num_best])
    assert found.num_played < found.num_layouts == len(candidates)
    if name == "little memory":
        assert found.num_too_large > 0


@pytest.mark.parametrize("name", ["packs", "samples", "experts"])
def test_every_layout_is_a_recipe_that_runs(name: str) -> None:
    problem = make_problem(**PROBLEMS[name])
    for one in all_candidates(problem)[1]:
        recipe = recipe_of(problem.recipe, one.layout, one.played.counts)
        check_placement(recipe.parallel)
        assert validate_layout(recipe, problem.num_gpus) == one.layout.data
        validate_model(recipe, facts_of(problem.workload.architecture))
        assert topology_of(recipe.parallel, problem.num_gpus) == one.layout.topology
        assert sum(one.played.counts) == ARCHITECTURE.language.num_layers


def test_expert_parallelism_is_searched() -> None:
    found = {
        (one.layout.expert, one.layout.expert_tensor, one.layout.dispatcher)
        for one in all_candidates(make_problem(architecture=EXPERTS))[1]
    }
    # 12 experts on 4 GPUs, or 3 beside an encoder; whole ones, since there are enough
    assert found == {(expert, 1, "alltoall") for expert in (1, 2, 3, 4)}


@pytest.mark.parametrize("name", ["packs", "experts"])
def test_what_is_printed_and_written(name: str) -> None:
    problem = make_problem(**PROBLEMS[name])
    space, _ = all_candidates(problem)
    found = search(problem, space)
    text = page(found, problem.hardware, problem.num_gpus)
    for word in ("Nothing here was measured on a GPU", "MFU", "bubble", "optimizer", "own_ranks", "layouts divide"):
        assert word in text
    tree = yaml.safe_load(block(problem.recipe, found.plans[0]))
    planned = recipe_to_dict(recipe_of(problem.recipe, found.plans[0].layout, found.plans[0].counts))
    for section, values in tree.items():
        for key, value in values.items():
            assert planned[section][key] == value, (section, key)


def test_no_memory_is_one_error() -> None:
    problem = make_problem(memory_gb=0.5)
    space, _ = all_candidates(problem)
    with pytest.raises(UseError, match=r"--memory-gb: got 0\.5 .* expected at least .* for "):
        search(problem, space)


def test_gpus_that_nothing_uses() -> None:
    problem = make_problem(num_gpus=47, packing=False)
    with pytest.raises(UseError, match="--gpus: got 47"):
        search(problem, space_of(problem.recipe, 47, 8))
