"""Gradients of the first step, parameter by parameter, and the first step in bf16."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.invariant import canon
from tests.invariant.layouts import Member, layout
from tests.invariant.measure import StepRow, broken, distances, record
from tests.pool import PoolKeeper

Canonical = Callable[[str], list[StepRow]]

GRADIENT_MEMBERS: tuple[Member, ...] = (
    Member("TP2+SP", 2, layout(tp=2, sp=True), True, micro_batch_size=4),
    Member("TP2, vision TP1", 2, layout(tp=2, vision_tp=1), micro_batch_size=4),
    Member("PP2 x VPP2", 2, layout(pp=2, vpp=2), True),
    Member("CP2 p2p", 2, layout(cp=2, cp_comm="p2p"), True, micro_batch_size=4),
    Member("DP2", 2, {}, True),
    Member("TP4 with 2 key-value heads", 4, layout(tp=4), True, micro_batch_size=8),
    Member("TP2+SP x PP2", 4, layout(tp=2, sp=True, pp=2), True, micro_batch_size=4),
    Member("TP2+SP x CP2", 4, layout(tp=2, sp=True, cp=2), micro_batch_size=4),
)
WHOLE_LIMIT = 1e-6
WORST_LIMITS = {"worst parameter's gradient, step 0": 1e-5}
# Some gradients vanish (the key bias of an attention has none): their rounding is compared with this share of the
# whole gradient's norm instead of their own.
LEAST_SHARE = 1e-3

BF16_MEMBERS: tuple[Member, ...] = (
    Member("TP2+SP", 2, layout(tp=2, sp=True), True),
    Member("PP2", 2, layout(pp=2), True),
    Member("DP2", 2, {}, True),
)
BF16_LIMITS = {"loss": 1e-3, "gradient norm": 1e-2}


@pytest.fixture(scope="module")
def whole_gradients(workers: PoolKeeper, inputs: Path) -> dict[str, torch.Tensor]:
    (gradients,) = workers(1).run("tests.invariant.runs:first_gradients", recipe=_unclipped(inputs, Member("", 1)))
    return gradients


def _unclipped(inputs: Path, member: Member) -> Any:
    return canon.recipe(
        inputs,
        parallel=member.parallel | {"use_distributed_optimizer": False},
        optimizer={"clip_grad": 0.0},
        train={"micro_batch_size": member.micro_batch_size},
    )


@pytest.mark.parametrize(
    "member", [one for one in GRADIENT_MEMBERS if one.quick or canon.FULL_MATRIX], ids=lambda member: member.name
)
def test_first_gradients(
    workers: PoolKeeper, inputs: Path, whole_gradients: dict[str, torch.Tensor], member: Member
) -> None:
    results = workers(member.world_size).run(
        "tests.invariant.runs:first_gradients", recipe=_unclipped(inputs, member), timeout_s=200
    )
    total = sum(float(expected.double().square().sum()) for expected in whole_gradients.values()) ** 0.5
    differences: dict[str, float] = {}
    for gradients in results:  # every copy that a rank holds
        for name, gradient in gradients.items():
            reference = "language.embedding.word_embeddings.weight" if "output_layer" in name else name
            difference = float((gradient.double() - whole_gradients[reference].double()).norm())
            differences[reference] = max(difference, differences.get(reference, 0.0))
    assert set(differences) == set(whole_gradients)
    relative = {
        name: difference / max(float(whole_gradients[name].double().norm()), LEAST_SHARE * total)
        for name, difference in differences.items()
    }
    assert sum(value**2 for value in differences.values()) ** 0.5 / total <= WHOLE_LIMIT
    measured = {"worst parameter's gradient, step 0": max(relative.values())}
    record(member.name, measured, "one process (qwen3_vl)", WORST_LIMITS)
    assert not broken(measured, WORST_LIMITS), max(relative, key=lambda name: relative[name])


def test_every_parameter_gets_a_gradient(whole_gradients: dict[str, torch.Tensor]) -> None:
    flat = [name for name, gradient in whole_gradients.items() if not gradient.abs().max() > 0]
    assert flat == []


@pytest.mark.parametrize("member", BF16_MEMBERS, ids=lambda member: member.name)
def test_first_step_in_bf16(workers: PoolKeeper, inputs: Path, member: Member) -> None:
    def first_step(world_size: int, parallel: dict[str, Any]) -> list[StepRow]:
        recipe = canon.recipe(inputs, parallel=parallel, train={"precision": "bf16"})
        results = workers(world_size).run("tests.invariant.runs:train", recipe=recipe, num_steps=1)
        assert all(rows == results[0] for rows in results), "ranks report different figures"
        return results[0]

    measured = distances(first_step(member.world_size, member.parallel), first_step(1, {}))
    measured = {f"{name}, step 0": measured[name] for name in BF16_LIMITS}
    limits = {f"{name}, step 0": limit for name, limit in BF16_LIMITS.items()}
    record(member.name, measured, "one process in bf16 (qwen3_vl)", limits, "equivalence-bf16")
    assert not broken(measured, limits)
