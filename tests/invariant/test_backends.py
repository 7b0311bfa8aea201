"""Twenty steps with the backends `te` and `flash`, over stand-ins, against twenty of `torch` in one process."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megavlm.config.schema import Recipe
from tests.contracts import TRANSFORMER_ENGINE
from tests.invariant import canon
from tests.invariant.layouts import EP2, EP2_TP2, FILLED, PLAIN, Member, layout
from tests.invariant.measure import StepRow, broken, distances, record
from tests.invariant.references import REFERENCES
from tests.pool import PoolKeeper

Canonical = Callable[[str], list[StepRow]]
OLD, NEWEST = TRANSFORMER_ENGINE
TIMEOUT_S = 300.0
SWITCH_AT = 10
_UNDERWAY = layout(tp=2, sp=True) | {"tp_comm_overlap": True}
_SELECTIVE = layout(recompute="selective", recompute_modules=("core_attn", "mlp", "layernorm"))
_CALLS = {
    "te": ("LayerNormLinear.forward", "DotProductAttention.forward", "FusedAdam.__init__"),
    "flash": ("flash_attn_varlen_func",),
}

# With the version of Transformer Engine; none: flash-attn.
MEMBERS: tuple[tuple[Member, str], ...] = (
    (Member("flash, CP2 all_gather", 2, layout(cp=2), True, micro_batch_size=4), ""),
    (Member("flash, PP2, selective recompute", 2, layout(pp=2) | _SELECTIVE), ""),
    (Member("one process, micro batch 4", 1, micro_batch_size=4), OLD),
    (Member("TP2+SP", 2, layout(tp=2, sp=True), quick=True), OLD),
    (Member("TP2, selective recompute", 2, layout(tp=2) | _SELECTIVE), OLD),
    (Member("CP2 p2p, micro batch 4", 2, layout(cp=2, cp_comm="p2p"), True, micro_batch_size=4), OLD),
    (Member("CP2 a2a", 2, layout(cp=2, cp_comm="a2a")), OLD),
    (Member("CP2 all_gather", 2, layout(cp=2), True), NEWEST),
    (Member("PP2, selective recompute", 2, layout(pp=2) | _SELECTIVE, True), OLD),
    (Member("PP2 x VPP2", 2, layout(pp=2, vpp=2)), NEWEST),
    (Member("TP2+SP, messages overlap", 2, _UNDERWAY, True, data=FILLED), OLD),
    (Member("TP2+SP, messages overlap, PP2", 4, _UNDERWAY | layout(pp=2), data=FILLED), NEWEST),
    (Member("LoRA", 1, {}, True, "LoRA"), OLD),
    (Member("LoRA, TP2+SP", 2, layout(tp=2, sp=True), True, "LoRA"), NEWEST),
    (Member("DoRA, TP2", 2, layout(tp=2), False, "DoRA"), OLD),
    (Member("IA3, TP2+SP", 2, layout(tp=2, sp=True), False, "IA3"), OLD),
    (Member("adapters, TP2+SP", 2, layout(tp=2, sp=True), True, "adapters"), OLD),
    (Member("encoder spread, TP2+SP", 2, layout(placement="spread", tp=2, sp=True)), OLD),
    (Member("experts EP2", 2, EP2, True, "experts balanced"), OLD),
    (Member("experts EP2 of TP2+SP", 2, EP2_TP2, False, "experts balanced"), NEWEST),
    (Member("experts TP2+SP", 2, layout(tp=2, sp=True), True, "experts balanced"), OLD),
    (Member("gated cross-attention, TP2+SP", 2, layout(tp=2, sp=True), True, "gated_cross_attention"), OLD),
    (Member("gated cross-attention, CP2 p2p", 2, layout(cp=2, cp_comm="p2p"), False, "gated_cross_attention"), OLD),
    (Member("perceiver", 1, {}, False, "perceiver"), OLD),
    (Member("qformer, TP2+SP", 2, layout(tp=2, sp=True), False, "qformer"), OLD),
    (Member("InternVL 6B TP2+SP", 2, layout(tp=2, sp=True), False, "internvl_6b"), OLD),
    (Member("Qwen2.5-VL CP2 p2p", 2, layout(cp=2, cp_comm="p2p"), False, "qwen2_5_vl"), OLD),
)

_ONE = Member("one process", 1)
_EXPERTS = Member("one process", 1, against="experts balanced")
_ADAPTED = Member("one process", 1, against="LoRA")
# A checkpoint that one backend writes and the other goes on from, in another layout.
SWITCHES: tuple[tuple[str, Member, str, Member, str], ...] = (
    ("te TP2+SP to torch", Member("TP2+SP", 2, layout(tp=2, sp=True)), OLD, _ONE, ""),
    (
        "torch to te TP2, optimizer not distributed",
        Member("one", 1, PLAIN),
        "",
        Member("", 2, layout(tp=2) | PLAIN),
        OLD,
    ),
    ("te experts EP2 to torch", Member("EP2", 2, EP2, against="experts balanced"), OLD, _EXPERTS, ""),
    ("te LoRA TP2+SP to torch", Member("TP2+SP", 2, layout(tp=2, sp=True), against="LoRA"), OLD, _ADAPTED, ""),
    ("torch to te experts EP2 of TP2+SP", _EXPERTS, "", Member("", 2, EP2_TP2, against="experts balanced"), OLD),
)
QUICK_SWITCHES = (0, 3, 4)
# What make test-next runs with the newest megatron-core, too.
NEXT_CORE = ("CP2 all_gather", "experts EP2", "torch to te experts EP2 of TP2+SP")


def _recipe(inputs: Path, member: Member, backend: str) -> Recipe:
    reference = REFERENCES[member.against]
    return canon.recipe_of(
        inputs,
        reference,
        parallel=member.parallel,
        model={"backend": backend},
        train={"micro_batch_size": member.micro_batch_size},
        data=member.data,
    )


def _run(workers: PoolKeeper, recipe: Recipe, size: int, version: str, name: str, num_steps: int) -> list[StepRow]:
    """Rows of a run, which every rank reports alike; the backend's package has been called."""
    results = workers(size, version).run(
        "tests.stand_ins.running:run",
        timeout_s=TIMEOUT_S,
        name=f"tests.invariant.runs:{name}",
        recipe=recipe,
        num_steps=num_steps,
    )
    for rows, calls in results:
        assert rows == results[0][0], "ranks report different figures"
        assert all(calls.get(call, 0) > 0 for call in _CALLS.get(recipe.model.backend, ())), calls
    rows_of_first: list[StepRow] = results[0][0]
    return rows_of_first


def _chosen(table: Sequence[Any], names: Sequence[str], quick: Sequence[bool]) -> list[Any]:
    return [
        pytest.param(*one, id=name, marks=[pytest.mark.next_core] if name in NEXT_CORE else [])
        for one, name, is_quick in zip(table, names, quick, strict=True)
        if is_quick or canon.FULL_MATRIX
    ]


@pytest.mark.parametrize(
    ("member", "version"),
    _chosen(MEMBERS, [one.name for one, _ in MEMBERS], [one.quick for one, _ in MEMBERS]),
)
def test_layout_trains_to_the_same(
    workers: PoolKeeper, inputs: Path, canonical: Canonical, member: Member, version: str
) -> None:
    recipe = _recipe(inputs, member, "te" if version else "flash")
    rows = _run(workers, recipe, member.world_size, version, "train", canon.NUM_STEPS)
    measured = distances(rows, canonical(member.against))
    against = f"one process, torch ({member.against})"
    name = f"te over a stand-in for {version}, {member.name}" if version else f"{member.name}, over a stand-in"
    record(name, measured, against, topic="backends")
    assert not broken(measured)


@pytest.mark.parametrize(
    ("name", "before", "version_before", "after", "version_after"),
    _chosen(SWITCHES, [one[0] for one in SWITCHES], [number in QUICK_SWITCHES for number in range(len(SWITCHES))]),
)
def test_checkpoints_interchange(
    workers: PoolKeeper,
    inputs: Path,
    tmp_path: Path,
    canonical: Canonical,
    name: str,
    before: Member,
    version_before: str,
    after: Member,
    version_after: str,
) -> None:
    first, second = (
        dataclasses.replace(_recipe(inputs, member, "te" if version else "torch"), output_dir=str(tmp_path))
        for member, version in ((before, version_before), (after, version_after))
    )
    rows = _run(workers, first, before.world_size, version_before, "train_and_save", SWITCH_AT)
    rest = canon.NUM_STEPS - SWITCH_AT
    rows = rows + _run(workers, second, after.world_size, version_after, "resume_and_train", rest)
    measured = distances(rows, canonical(before.against))
    against = f"one process, torch ({before.against}), not interrupted"
    record(f"resume at step {SWITCH_AT}, {name}", measured, against, topic="backends")
    assert not broken(measured)
