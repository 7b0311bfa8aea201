"""Runs that change their layout at a checkpoint, and what newer versions of Megatron-Core are tried with."""

from dataclasses import dataclass

from tests.invariant.layouts import EP2, EP2_TP2, PACKED, PACKED_PAIRS, PLAIN, Member, experts, layout


@dataclass(frozen=True)
class Switch:
    """Steps in one layout, a checkpoint, and the rest in another.

    `is_async`: the checkpoint is written while the first run goes on.
    """

    name: str
    before: Member
    after: Member
    quick: bool = False
    is_async: bool = False


_ONE, _ONE_PLAIN = Member("one process", 1), Member("one process", 1, PLAIN)
_TP2, _TP2PLAIN = Member("TP2", 2, layout(tp=2), micro_batch_size=4), Member("TP2", 2, layout(tp=2) | PLAIN)
_TP2_PP2 = Member("TP2 x PP2", 4, layout(tp=2, pp=2), micro_batch_size=4)
_VPP2 = Member("PP2 x VPP2", 2, layout(pp=2, vpp=2))
_CP2, _DP2 = Member("CP2", 2, layout(cp=2), micro_batch_size=4), Member("DP2", 2)

_STAGES = Member("2 encoder stages + PP2", 4, layout(placement="stage", pp=4, vision_pp=2))
_BUBBLE = Member("encoder in bubbles, TP2+SP x PP2", 4, layout(placement="bubble", tp=2, sp=True, pp=2))
_SPREAD = Member("encoder spread, PP2", 2, layout(placement="spread", pp=2))
_OWN = Member("encoder on own rank + DP2", 3, layout(placement="own_ranks"))
_OWN_PLAIN = Member("encoder on own rank + one", 2, layout(placement="own_ranks") | PLAIN)

_EXPERTS_ONE, _EXPERTS_EP2 = experts("one process", 1, {}), experts("EP2", 2, EP2)
_EXPERTS_FOUR = experts("EP2 of TP2+SP x PP2", 4, EP2_TP2 | layout(pp=2))

_HEADS_ONE, _HEADS_TP2 = (
    Member(name, size, layout(tp=size), against="internvl_6b") for name, size in (("one process", 1), ("TP2", 2))
)
_HEADS_TP2PLAIN = Member("TP2", 2, layout(tp=2) | PLAIN, against="internvl_6b")
_HEADS_ONE_PLAIN = Member("one process", 1, PLAIN, against="internvl_6b")

_GATED_ONE = Member("one process", 1, against="gated_cross_attention")
_GATED_FOUR = Member("TP2+SP x PP2", 4, layout(tp=2, sp=True, pp=2), against="gated_cross_attention")

_LORA_ONE, _LORA_VPP2 = (
    Member("one process", 1, against="LoRA"),
    Member("PP2 x VPP2", 2, layout(pp=2, vpp=2), against="LoRA"),
)
_LORA_FOUR = Member("TP2+SP x PP2", 4, layout(tp=2, sp=True, pp=2), against="LoRA")
_LORA_ONE_PLAIN = Member("one process", 1, PLAIN, against="LoRA")
_LORA_TP4_PLAIN = Member("TP4 with 2 key-value heads", 4, layout(tp=4) | PLAIN, against="LoRA")

_MIXTURE_DP2 = Member("DP2", 2, against="mixture", micro_batch_size=2)
_MIXTURE_PACKED = Member("packed by cost, PP2", 2, layout(pp=2), against="mixture", data=PACKED)

_TIMED_VPP2 = Member("PP2 x VPP2", 2, layout(pp=2, vpp=2), against="schedules")
_TIMED_DP2 = Member("DP2", 2, against="schedules")
_TIMED_TP2_PLAIN = Member("TP2", 2, layout(tp=2) | PLAIN, against="schedules")
_TIMED_PP2_PLAIN = Member("PP2", 2, layout(pp=2) | PLAIN, against="schedules")
_TIMED_EP2 = Member("EP2", 2, EP2, against="schedules, experts")
_TIMED_TP2_EXPERTS = Member("TP2+SP", 2, layout(tp=2, sp=True), against="schedules, experts")
_TASKS_DP2 = Member("DP2", 2, against="tasks by gradnorm")
_TASKS_TP2 = Member("TP2+SP", 2, layout(tp=2, sp=True), against="tasks by gradnorm", micro_batch_size=2)
_UNCERTAIN_ONE = Member("one process", 1, against="tasks by uncertainty")
_UNCERTAIN_PP2 = Member("PP2", 2, layout(pp=2), against="tasks by uncertainty")
_RATIO_ONE = Member("one process", 1, against="tasks by loss ratio", data=PACKED)
_RATIO_CP2 = Member("CP2", 2, layout(cp=2), against="tasks by loss ratio", micro_batch_size=4)
_PAIRED_TP2 = Member("TP2+SP", 2, layout(tp=2, sp=True), against="contrastive", micro_batch_size=4)
_PAIRED_DP2 = Member("DP2, packed by cost", 2, against="contrastive", data=PACKED_PAIRS)

SWITCHES: tuple[Switch, ...] = (
    Switch("schedules: PP2 x VPP2 to DP2", _TIMED_VPP2, _TIMED_DP2, quick=True),
    Switch("schedules: TP2 to PP2, optimizer not distributed", _TIMED_TP2_PLAIN, _TIMED_PP2_PLAIN, quick=True),
    Switch("schedules: EP2 to TP2+SP", _TIMED_EP2, _TIMED_TP2_EXPERTS),
    Switch("mixture with a curriculum: DP2 to packed by cost, PP2", _MIXTURE_DP2, _MIXTURE_PACKED, quick=True),
    Switch("tasks by gradnorm: DP2 to TP2+SP", _TASKS_DP2, _TASKS_TP2, quick=True),
    Switch("tasks by uncertainty: one process to PP2", _UNCERTAIN_ONE, _UNCERTAIN_PP2, quick=True),
    Switch("tasks by loss ratio: packed by cost to CP2", _RATIO_ONE, _RATIO_CP2),
    Switch("contrastive: TP2+SP to DP2, packed by cost", _PAIRED_TP2, _PAIRED_DP2),
    Switch("gated cross-attention: TP2+SP x PP2 to one process", _GATED_FOUR, _GATED_ONE, quick=True),
    Switch("InternVL 6B: TP2 to one process", _HEADS_TP2, _HEADS_ONE, quick=True),
    Switch("InternVL 6B: one process to TP2, optimizer not distributed", _HEADS_ONE_PLAIN, _HEADS_TP2PLAIN),
    Switch("LoRA: TP2+SP x PP2 to PP2 x VPP2", _LORA_FOUR, _LORA_VPP2, quick=True),
    Switch("LoRA: one process to TP2+SP x PP2", _LORA_ONE, _LORA_FOUR),
    Switch("LoRA: TP4 to one process, optimizer not distributed", _LORA_TP4_PLAIN, _LORA_ONE_PLAIN, quick=True),
    Switch("experts: one process to EP2 of TP2+SP x PP2", _EXPERTS_ONE, _EXPERTS_FOUR, quick=True),
    Switch("experts: EP2 to one process", _EXPERTS_EP2, _EXPERTS_ONE, quick=True),
    Switch("experts: EP2 of TP2+SP x PP2 to EP2", _EXPERTS_FOUR, _EXPERTS_EP2),
    Switch("one process to one process", _ONE, _ONE, quick=True),
    Switch("one process to TP2 x PP2", _ONE, _TP2_PP2, quick=True),
    Switch("TP2 x PP2 to one process", _TP2_PP2, _ONE),
    Switch("PP2 x VPP2 to TP2", _VPP2, _TP2, quick=True),
    Switch("DP2 with distributed optimizer to CP2", _DP2, _CP2, quick=True),
    Switch("TP2 to DP2", _TP2, _DP2),
    Switch("one process to TP2, optimizer not distributed", _ONE_PLAIN, _TP2PLAIN, quick=True),
    Switch("DP2 to DP2, saved while it goes on", _DP2, _DP2, quick=True, is_async=True),
    Switch("TP2 to one process, saved while it goes on", _TP2, _ONE, is_async=True),
    Switch(
        "one process to TP2, optimizer not distributed, saved while it goes on", _ONE_PLAIN, _TP2PLAIN, is_async=True
    ),
    Switch("2 encoder stages + PP2 to encoder in bubbles, TP2+SP x PP2", _STAGES, _BUBBLE, quick=True),
    Switch("encoder in bubbles, TP2+SP x PP2 to one process", _BUBBLE, _ONE),
    Switch("encoder on own rank + DP2 to encoder spread, PP2", _OWN, _SPREAD, quick=True),
    Switch("encoder spread, PP2 to encoder on own rank + DP2", _SPREAD, _OWN),
    Switch("one process to encoder on own rank, optimizer not distributed", _ONE_PLAIN, _OWN_PLAIN),
    Switch("encoder on own rank to TP2, optimizer not distributed", _OWN_PLAIN, _TP2PLAIN),
)

# Names of members and switches of `make test` that make test-next runs with the newest megatron-core, too.
NEXT_CORE: frozenset[str] = frozenset(
    {
        "micro batch 8: all rows packed into one",
        "recompute full, block",
        "TP2+SP, micro batch 4, selective recompute",
        "PP2, layers 1 + 3",
        "PP2 x VPP2",
        "CP2 all_gather",
        "CP2 p2p, micro batch 4",
        "DP2",
        "DP2, distributed optimizer, overlap",
        "experts balanced: EP2",
        "experts balanced: EP2 of TP2+SP",
        "encoder stage + PP1",
        "encoder spread, PP2",
        "encoder in bubbles, PP2 x VPP2",
        "encoder on own rank + one",
        "InternVL 6B TP2+SP",
        "gated cross-attention, CP2 all_gather",
    }
    | {switch.name for switch in SWITCHES if switch.quick}
)
