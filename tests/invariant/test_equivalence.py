"""Twenty steps under every layout against twenty steps in one process."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megavlm.config.schema import Recipe
from tests.invariant import canon
from tests.invariant.layouts import SMALL_BUCKET, Member
from tests.invariant.measure import LIMITS, StepRow, broken, distances, record
from tests.invariant.members import MEMBERS
from tests.invariant.references import REFERENCES
from tests.invariant.switches import NEXT_CORE, SWITCHES, Switch
from tests.pool import PoolKeeper

Canonical = Callable[[str], list[StepRow]]
TIMEOUT_S = 300.0
SWITCH_AT = 10
NUM_STEPS_BESIDE = 2


def _chosen(table: Sequence[Member] | Sequence[Switch]) -> list[Any]:
    """Parameters of a test: what runs in this target, and marked what runs with the newest megatron-core too."""
    return [
        pytest.param(one, id=one.name, marks=[pytest.mark.next_core] if one.name in NEXT_CORE else [])
        for one in table
        if one.quick or canon.FULL_MATRIX
    ]


def _recipe(inputs: Path, member: Member, **changes: dict[str, Any]) -> Recipe:
    sections = {
        "parallel": member.parallel,
        "model": member.model,
        "train": {"micro_batch_size": member.micro_batch_size},
        "data": member.data,
    }
    for name, values in changes.items():
        sections[name] = sections.get(name, {}) | values
    return canon.recipe_of(inputs, REFERENCES[member.against], **sections)


def _of_all_ranks(results: list[list[StepRow]]) -> list[StepRow]:
    assert all(rows == results[0] for rows in results), "ranks report different figures"
    return results[0]


@pytest.mark.parametrize("reference", REFERENCES)
def test_canonical_run_learns_and_would_show_an_encoder_fault(canonical: Canonical, reference: str) -> None:
    rows = canonical(reference)
    assert rows[-1].loss < rows[0].loss - (0.3 if "frozen language" not in reference else 0.01)
    assert {row.num_images for row in rows} != {rows[0].num_images}
    if REFERENCES[reference].stage == "sft":
        assert len({row.count for row in rows}) > 5
    for component in rows[0].norms:
        shares = [row.norms[component] / row.norms["total"] for row in rows if row.norms[component] > 0]
        assert len(shares) == len(rows) or "unfreeze" in REFERENCES[reference].optimizer
        assert min(shares) >= 0.05, component


@pytest.mark.parametrize("member", _chosen(MEMBERS))
def test_layout_trains_to_the_same(workers: PoolKeeper, inputs: Path, canonical: Canonical, member: Member) -> None:
    results = workers(member.world_size).run(
        "tests.invariant.runs:train",
        timeout_s=TIMEOUT_S,
        recipe=_recipe(inputs, member),
        num_steps=canon.NUM_STEPS,
        bucket_size=member.bucket_size,
    )
    measured = distances(_of_all_ranks(results), canonical(member.against))
    record(member.name, measured, f"one process ({member.against})")
    assert not broken(measured)


@pytest.mark.parametrize("switch", _chosen(SWITCHES))
def test_resuming_in_another_layout_continues_the_run(
    workers: PoolKeeper, inputs: Path, tmp_path: Path, canonical: Canonical, switch: Switch
) -> None:
    before, after = (
        dataclasses.replace(_recipe(inputs, member), output_dir=str(tmp_path))
        for member in (switch.before, switch.after)
    )
    first = workers(switch.before.world_size).run(
        "tests.invariant.runs:train_and_save",
        timeout_s=TIMEOUT_S,
        recipe=before,
        num_steps=SWITCH_AT,
        num_steps_beside=NUM_STEPS_BESIDE if switch.is_async else 0,
    )
    second = workers(switch.after.world_size).run(
        "tests.invariant.runs:resume_and_train",
        timeout_s=TIMEOUT_S,
        recipe=after,
        num_steps=canon.NUM_STEPS - SWITCH_AT,
    )
    measured = distances(_of_all_ranks(first) + _of_all_ranks(second), canonical(switch.before.against))
    against = f"one process ({switch.before.against}), not interrupted"
    record(f"resume at step {SWITCH_AT}, {switch.name}", measured, against)
    assert not broken(measured)


def test_a_reference_without_adapters_is_the_one_that_is_kept(canonical: Canonical) -> None:
    measured = distances(canonical("dpo, adapters off"), canonical("dpo, LoRA"))
    assert not broken(measured)


def test_what_is_chosen_for_the_newest_core_is_there() -> None:
    assert NEXT_CORE <= {one.name for one in (*MEMBERS, *SWITCHES) if one.quick}


@pytest.mark.parametrize("mistake", ["balance times local tokens", "balance counts padding", "balance not there"])
def test_a_mistake_in_the_load_balancing_loss_would_show(
    workers: PoolKeeper, inputs: Path, canonical: Canonical, mistake: str
) -> None:
    member = next(one for one in MEMBERS if one.name == "experts balanced: CP2")
    results = workers(2).run(
        "tests.invariant.runs:train_broken", recipe=_recipe(inputs, member), num_steps=3, mistake=mistake
    )
    measured = distances(_of_all_ranks(results), canonical(member.against)[:3])
    assert measured["gradient norm"] > 10 * LIMITS["gradient norm"]


def test_a_mistake_in_sums_over_context_ranks_would_show(
    workers: PoolKeeper, inputs: Path, canonical: Canonical
) -> None:
    member = next(one for one in MEMBERS if one.name == "dpo: CP2 all_gather")
    results = workers(2).run(
        "tests.invariant.runs:train_with_local_context_gradients", recipe=_recipe(inputs, member), num_steps=3
    )
    measured = distances(_of_all_ranks(results), canonical(member.against)[:3])
    assert measured["gradient norm, step 0"] > 100 * LIMITS["gradient norm, step 0"]


@pytest.mark.parametrize(
    ("mistake", "member"),
    [
        ("gradient of A not summed, TP", "LoRA TP2, vision TP1"),
        ("gradients not summed, SP", "LoRA TP2+SP, recompute full"),
        ("A drawn by each rank for itself", "LoRA TP2, vision TP1"),
    ],
)
def test_a_mistake_in_adapters_would_show(
    workers: PoolKeeper, inputs: Path, canonical: Canonical, mistake: str, member: str
) -> None:
    broken_member = next(one for one in MEMBERS if one.name == member)
    (first, *_) = workers(2).run(
        "tests.invariant.runs:train_with_broken_adapters",
        recipe=_recipe(inputs, broken_member),
        num_steps=4,
        mistake=mistake,
    )
    measured = distances(first, canonical(broken_member.against)[:4])
    assert measured["gradient norm"] > 10 * LIMITS["gradient norm"]


@pytest.mark.parametrize(
    ("mistake", "member"),
    [
        ("layers counted on each rank", "schedules: PP2 x VPP2"),
        ("norms of a rank's own part", "schedules: TP2+SP"),
        ("frozen gradients counted", "schedules: PP2 x VPP2"),
    ],
)
def test_a_mistake_in_schedules_would_show(
    workers: PoolKeeper, inputs: Path, canonical: Canonical, mistake: str, member: str
) -> None:
    broken_member = next(one for one in MEMBERS if one.name == member)
    (first, *_) = workers(2).run(
        "tests.invariant.runs:train_with_broken_schedules",
        recipe=_recipe(inputs, broken_member),
        num_steps=7,  # some layers of the language model begin in the sixth
        mistake=mistake,
    )
    measured = distances(first, canonical(broken_member.against)[:7])
    assert measured["gradient norm"] > 10 * LIMITS["gradient norm"]


def test_small_buckets_are_several(workers: PoolKeeper, inputs: Path) -> None:
    overlap = next(member for member in MEMBERS if member.bucket_size and member.world_size == 2)
    counts = workers(2).run(
        "tests.invariant.runs:num_buckets", recipe=_recipe(inputs, overlap), bucket_size=SMALL_BUCKET
    )
    assert min(counts) >= 3


def test_a_pipeline_rank_has_nothing_to_train(workers: PoolKeeper, inputs: Path) -> None:
    member = next(member for member in MEMBERS if member.against == "frozen language")
    first, second = workers(2).run("tests.invariant.runs:num_trainable", recipe=_recipe(inputs, member))
    assert first > 0 and second == 0
