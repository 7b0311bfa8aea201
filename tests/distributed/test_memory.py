"""The planner's memory against the bytes of real training steps, in every place of the encoder."""

from pathlib import Path
from typing import Any

import pytest

from tests import evidence
from tests.invariant import canon
from tests.invariant.layouts import Member, layout
from tests.invariant.references import REFERENCES, Reference
from tests.pool import PoolKeeper

MOST_ERROR = 0.05
_FULL = layout(recompute="full", recompute_method="uniform", recompute_num_layers=1)
_THREE = layout(recompute="selective", recompute_modules=("core_attn", "mlp", "layernorm"))
_CORE = layout(recompute="selective", recompute_modules=("core_attn",))
_MOE = layout(recompute="selective", recompute_modules=("core_attn", "moe", "layernorm"))

# `against` is the family here.
_HEADS: tuple[Member, ...] = tuple(
    Member(name, world_size, parallel, quick, "internvl_6b")
    for name, world_size, parallel, quick in (
        ("one process", 1, {}, True),
        ("recompute full", 1, _FULL, False),
        ("recompute selective, three modules", 1, _THREE, False),
        ("TP2+SP", 2, layout(tp=2, sp=True), True),
    )
)
_EXPERTS: tuple[Member, ...] = tuple(
    Member(name, world_size, parallel, quick, "experts balanced")
    for name, world_size, parallel, quick in (
        ("one process", 1, {}, True),
        ("recompute full", 1, _FULL, True),
        ("recompute selective, three modules", 1, _MOE, True),
        ("optimizer not distributed", 1, layout(sharded_optimizer=False), False),
        ("EP2 alltoall", 2, layout(ep=2), True),
        ("EP2 allgather", 2, layout(ep=2, dispatcher="allgather"), True),
        ("EP2 in TP2+SP", 2, layout(ep=2, etp=1, tp=2, sp=True), True),
        ("TP2+SP, experts too", 2, layout(tp=2, sp=True), True),
        ("TP2+SP, experts too, allgather", 2, layout(tp=2, sp=True, dispatcher="allgather"), False),
        ("EP2 in CP2", 2, layout(ep=2, cp=2), False),
        ("PP2", 2, layout(pp=2), False),
        ("EP2 x PP2, encoder in bubbles", 4, layout(ep=2, pp=2, placement="bubble"), False),
        ("EP2 x TP2+SP, experts too", 4, layout(ep=2, tp=2, sp=True), False),
    )
)
_CONNECTED: tuple[Member, ...] = tuple(
    Member(name, world_size, parallel, quick, family)
    for family in ("llava_next", "llava_onevision", "perceiver", "qformer", "gated_cross_attention")
    for name, world_size, parallel, quick in (
        ("one process", 1, {}, True),
        ("recompute full", 1, _FULL, False),
        ("recompute selective, three modules", 1, _THREE, False),
        ("TP2+SP", 2, layout(tp=2, sp=True), family == "gated_cross_attention"),
        ("CP2 all_gather", 2, layout(cp=2), False),
        ("encoder stage + PP1", 2, layout(placement="stage", pp=2), False),
        ("encoder spread, PP2", 2, layout(placement="spread", pp=2), family != "qformer"),
        ("encoder in bubbles, PP2 x VPP2", 2, layout(placement="bubble", pp=2, vpp=2), False),
    )
)
_VARIANTS = {
    "logits in pieces": Reference(
        "qwen3_vl", {}, {"cross_entropy_loss_fusion": True, "cross_entropy_chunk_tokens": 16}
    ),
    "experts frozen": Reference("qwen3_vl_moe", {"freeze_llm": True}, {"moe_aux_loss_coeff": 0.1}),
    "gated cross-attention, language frozen": Reference("gated_cross_attention", {"freeze_llm": True}),
    "perceiver frozen": Reference("perceiver", {"freeze_aligner": True}),
    "Q-Former, tower frozen": Reference("qformer", {"freeze_vit": True}),
}
MEMBERS: tuple[Member, ...] = (
    *_HEADS,
    *_EXPERTS,
    *_CONNECTED,
    *(Member("one process", 1, {}, True, name) for name in _VARIANTS),
    Member("TP2+SP", 2, layout(tp=2, sp=True), True, "logits in pieces"),
    Member("PP2", 2, layout(pp=2), False, "logits in pieces"),
) + tuple(
    Member(name, world_size, parallel, quick and family == "qwen3_vl", family)
    for family in ("qwen3_vl", "llava", "qwen2_5_vl", "internvl")
    for name, world_size, parallel, quick in (
        ("one process", 1, {}, True),
        ("recompute full", 1, _FULL, True),
        ("recompute selective, three modules", 1, _THREE, True),
        ("recompute selective, core_attn", 1, _CORE, False),
        ("optimizer not distributed", 1, layout(sharded_optimizer=False), False),
        ("first stage, PP2", 2, layout(pp=2), True),
        ("encoder stage + PP1", 2, layout(placement="stage", pp=2), True),
        ("encoder spread, PP2", 2, layout(placement="spread", pp=2), True),
        ("encoder in bubbles, PP2", 2, layout(placement="bubble", pp=2), True),
        ("encoder in bubbles, PP2, one more", 2, layout(placement="bubble", pp=2, extra_in_flight=1), False),
        ("encoder in bubbles, PP2 x VPP2", 2, layout(placement="bubble", pp=2, vpp=2), False),
        ("encoder in bubbles twice, PP2", 2, layout(placement="bubble", pp=2, encode_twice=True), True),
        ("encoder on own rank + one", 2, layout(placement="own_ranks"), True),
        ("TP2+SP", 2, layout(tp=2, sp=True), True),
        ("TP2", 2, layout(tp=2), False),
        ("CP2 all_gather", 2, layout(cp=2), True),
        ("CP2 p2p", 2, layout(cp=2, cp_comm="p2p"), False),
        ("2 encoder stages + PP2", 4, layout(placement="stage", pp=4, vision_pp=2), False),
        ("encoder in bubbles, TP2+SP x PP2", 4, layout(placement="bubble", tp=2, sp=True, pp=2), False),
        ("encoder spread, PP2 x DP2", 4, layout(placement="spread", pp=2), False),
        ("encoder on own ranks DP2 + TP2", 4, layout(placement="own_ranks", vision_dp=2, tp=2), False),
    )
)
PRECISIONS = ("fp32", "bf16")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("memory")
    canon.write_inputs(root)
    return root


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "member",
    [one for one in MEMBERS if one.quick or canon.FULL_MATRIX],
    ids=lambda member: f"{member.against}, {member.name}",
)
def test_predicted_is_counted(workers: PoolKeeper, inputs: Path, member: Member, precision: str) -> None:
    train: dict[str, Any] = {"precision": precision, "micro_batch_size": 2}
    reference = (REFERENCES | _VARIANTS)[member.against]
    recipe = canon.recipe(
        inputs,
        reference.family,
        parallel=member.parallel,
        train=train,
        optimizer=reference.optimizer,
        model=reference.model,
    )
    results = workers(member.world_size).run("tests.distributed.memory_cases:compare", recipe=recipe)
    errors = {"activations": 0.0, "all": 0.0}
    for rank, parts in enumerate(results):
        assert parts["activations"][0] > 0
        for name in ("weights", "gradients"):
            assert parts[name][0] == parts[name][1], (rank, name)
        for name in errors:
            counted, predicted = parts[name]
            errors[name] = max(errors[name], abs(predicted / counted - 1))
    evidence.record(
        "balance",
        [
            evidence.row(
                f"memory, {member.against}, {member.name}, {precision}: {name} of a rank, predicted over counted",
                error,
                unit="largest relative difference of a rank",
                required=f"<= {MOST_ERROR} (aim 0.014)",
                reference="bytes of a real step",
                command="make test-full" if canon.FULL_MATRIX else "make test",
            )
            for name, error in errors.items()
        ],
    )
    assert max(errors.values()) <= MOST_ERROR, errors
