"""Layouts over NCCL: twenty steps in fp32 against one GPU, and the first step in bf16 and FP8 for each backend."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gpu.conftest import Figures, GpuWorkers, need
from tests.invariant import canon
from tests.invariant.layouts import EP2, Member, layout
from tests.invariant.measure import LIMITS, StepRow, distances
from tests.invariant.references import REFERENCES
from tests.invariant.test_gradients import BF16_LIMITS

pytestmark = pytest.mark.gpu

TIMEOUT_S = 600.0
MEMBERS: tuple[Member, ...] = (
    Member("micro batch 4", 1, micro_batch_size=4),
    Member("recompute full", 1, layout(recompute="full", recompute_method="uniform", recompute_num_layers=1)),
    Member("TP2+SP", 2, layout(tp=2, sp=True)),
    Member("PP2", 2, layout(pp=2)),
    Member("PP2 x VPP2", 2, layout(pp=2, vpp=2)),
    Member("CP2 p2p", 2, layout(cp=2, cp_comm="p2p")),
    Member("DP2, overlap", 2, layout(overlap_reduce=True, overlap_gather=True)),
    Member("encoder spread, PP2", 2, layout(placement="spread", pp=2)),
    Member("experts EP2", 2, EP2, against="experts"),
    Member("TP2+SP x PP2", 4, layout(tp=2, sp=True, pp=2)),
    Member("TP2+SP x CP2", 4, layout(tp=2, sp=True, cp=2, cp_comm="p2p")),
    Member("TP2+SP x PP2 x DP2", 8, layout(tp=2, sp=True, pp=2)),
    Member("TP2+SP x CP2 x PP2", 8, layout(tp=2, sp=True, cp=2, cp_comm="p2p", pp=2)),
)
BACKENDS = ("torch", "flash", "te")
# FP8's scales depend on what lies on a rank. Assumed, until it has been measured.
FP8_LIMITS = {"loss": 1e-2, "gradient norm": 1e-1}
HALF_LIMITS = {"bf16": BF16_LIMITS, "fp8": FP8_LIMITS}
HALF = [*((backend, "bf16") for backend in BACKENDS), ("te", "fp8")]
# Megatron-Core enters FP8 around transformer layers: the projector stays in bf16.
FP8 = {"aligner_fp8_recipe": "none"}

Rows = Callable[[Member, str, str, int], list[StepRow]]


@pytest.fixture(scope="module")
def rows_of(gpu_workers: GpuWorkers, inputs: Path) -> Rows:
    """Rows of a run by (member, backend, precision, number of steps); those on one GPU are run once."""
    done: dict[tuple[str, str, str, str, int], list[StepRow]] = {}

    def run(member: Member, backend: str, precision: str, num_steps: int) -> list[StepRow]:
        key = (member.name, member.against, backend, precision, num_steps)
        if key not in done:
            reference = REFERENCES[member.against]
            recipe = canon.recipe(
                inputs,
                reference.family,
                parallel=member.parallel,
                model=reference.model | {"backend": backend},
                train={"micro_batch_size": member.micro_batch_size, "precision": precision},
                fp8=FP8 if precision == "fp8" else {},
            )
            done[key], *others = gpu_workers(member.world_size).run(
                "tests.invariant.runs:train", timeout_s=TIMEOUT_S, recipe=recipe, num_steps=num_steps
            )
            assert all(rows == done[key] for rows in others), "ranks report different figures"
        return done[key]

    return run


def one_gpu(member: Member) -> Member:
    """What a member is compared with."""
    return Member("one GPU", 1, against=member.against)


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_twenty_steps_in_fp32(member: Member, rows_of: Rows, figures: Figures) -> None:
    rows = rows_of(member, "torch", "fp32", canon.NUM_STEPS)
    figures(distances(rows, rows_of(one_gpu(member), "torch", "fp32", canon.NUM_STEPS)), LIMITS)


@pytest.mark.parametrize(("backend", "precision"), HALF)
@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_first_step_in_half_precision(
    member: Member, backend: str, precision: str, rows_of: Rows, figures: Figures
) -> None:
    need(backend)
    if backend == "flash" and member.parallel.get("cp_comm_type") == "p2p":
        pytest.skip("flash gathers keys, it has no ring")
    rows = rows_of(member, backend, precision, 1)
    measured = distances(rows, rows_of(one_gpu(member), backend, precision, 1))
    limits = HALF_LIMITS[precision]
    figures({name: measured[name] for name in limits}, limits)


@pytest.mark.parametrize("against", ["qwen3_vl", "qwen2_5_vl", "internvl", "experts"])
@pytest.mark.parametrize(("backend", "precision"), [case for case in HALF if case[0] != "torch"])
def test_backends_agree_on_one_gpu(against: str, backend: str, precision: str, rows_of: Rows, figures: Figures) -> None:
    need(backend)
    member = Member("one GPU", 1, against=against)
    measured = distances(rows_of(member, backend, precision, 1), rows_of(member, "torch", "bf16", 1))
    limits = HALF_LIMITS[precision]
    figures({name: measured[name] for name in limits}, limits)
