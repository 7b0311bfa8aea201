"""The equivalence class, as a table: every layout here trains to what one process trains to."""

from dataclasses import dataclass, field
from typing import Any

from megavlm.config.schema import ParallelConfig

_SHORT = {
    "tp": "tensor_model_parallel_size",
    "sp": "sequence_parallel",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "stages": "pipeline_model_parallel_layout",
    "cp": "context_parallel_size",
    "cp_comm": "cp_comm_type",
    "placement": "vision_placement",
    "vision_tp": "vision_tensor_model_parallel_size",
    "vision_pp": "vision_pipeline_model_parallel_size",
    "vision_dp": "vision_data_parallel_size",
    "max_live": "vision_max_live_microbatches",
    "extra_in_flight": "vision_extra_microbatches_in_flight",
    "encode_twice": "vision_recompute",
    "sharded_optimizer": "use_distributed_optimizer",
    "overlap_reduce": "overlap_grad_reduce",
    "overlap_gather": "overlap_param_gather",
    "recompute": "recompute_granularity",
    "recompute_method": "recompute_method",
    "recompute_num_layers": "recompute_num_layers",
    "recompute_modules": "recompute_modules",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "dispatcher": "moe_token_dispatcher_type",
    "offload": "cpu_offloading",
}


def layout(**knobs: Any) -> dict[str, Any]:
    """Fields of `ParallelConfig` by short names."""
    return {_SHORT[name]: value for name, value in knobs.items()}


@dataclass(frozen=True)
class Member:
    """One way to train.

    `against` names the single-process run that it must equal; `quick` members cover every feature, and the pairs that
    are cheap, in `make test`; all run in `make test-full`. Those of `NEXT_CORE` run in `make test-next` too.
    """

    name: str
    world_size: int
    parallel: dict[str, Any] = field(default_factory=dict)
    quick: bool = False
    against: str = "qwen3_vl"
    micro_batch_size: int = 1
    bucket_size: int | None = None
    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


# Parameters in a gradient bucket: a rank's part of the tiny model makes several.
SMALL_BUCKET = 40_000

_FULL = layout(recompute="full", recompute_method="uniform", recompute_num_layers=1)
_BLOCK = layout(recompute="full", recompute_method="block", recompute_num_layers=1)
_CORE = layout(recompute="selective", recompute_modules=("core_attn",))
_THREE = layout(recompute="selective", recompute_modules=("core_attn", "mlp", "layernorm"))
_OVERLAP = layout(overlap_reduce=True)
_OVERLAP_BOTH = layout(overlap_reduce=True, overlap_gather=True)
PLAIN = layout(sharded_optimizer=False)

# Rows of at most 160 tokens, split by cost (the longest sample has fewer).
PACKED = {"packing": True, "max_length": 160}
PACKED_PAIRS = PACKED | {"packing_length": 320}

# Fewer tokens than any row has, and no divisor of their number.
PIECES = {"cross_entropy_loss_fusion": True, "cross_entropy_chunk_tokens": 19}

EP2 = layout(ep=2)
EP2_TP2 = layout(ep=2, etp=1, tp=2, sp=True)
_MOE = layout(recompute="selective", recompute_modules=("core_attn", "moe", "layernorm"))


def experts(
    name: str, world_size: int, parallel: dict[str, Any], quick: bool = False, balanced: bool = True, **rest: Any
) -> Member:
    """A member with experts, whose load-balancing loss is learned, or not."""
    against = "experts balanced" if balanced else "experts"
    return Member(f"{against}: {name}", world_size, parallel, quick, against, **rest)


# In order of world size: a pool of processes is started once for each.
MEMBERS: tuple[Member, ...] = (
    # microbatches and packing
    Member("micro batch 2", 1, micro_batch_size=2),
    Member("micro batch 4", 1, micro_batch_size=4, quick=True),
    Member("micro batch 8: all rows packed into one", 1, micro_batch_size=8, quick=True),
    Member("packed by cost", 1, data=PACKED, quick=True),
    Member("LLaVA, all rows packed into one", 1, micro_batch_size=8, against="llava"),
    Member("gated cross-attention, all rows packed into one", 1, micro_batch_size=8, against="gated_cross_attention"),
    Member("gated cross-attention, recompute full", 1, _FULL, True, "gated_cross_attention"),
    Member("logits in pieces", 1, quick=True, model=PIECES),
    Member("activations in CPU memory", 1, layout(offload=True), True, micro_batch_size=4),
    Member("activations in CPU memory, recompute selective", 1, layout(offload=True) | _THREE),
    Member("logits in pieces, LLaVA", 1, against="llava", model=PIECES),
    # recompute
    Member("recompute full, uniform", 1, _FULL),
    Member("recompute full, block", 1, _BLOCK, quick=True),
    Member("recompute selective, core_attn", 1, _CORE),
    Member("recompute selective, core_attn + mlp + layernorm", 1, _THREE, quick=True),
    Member("optimizer not distributed", 1, PLAIN),
    experts("recompute full", 1, _FULL),
    experts("recompute selective, core_attn + moe + layernorm", 1, _MOE, True),
    experts("micro batch 4", 1, {}, balanced=False, micro_batch_size=4),
    experts("EP2", 2, EP2, True),
    experts("EP2", 2, EP2 | PLAIN, balanced=False),
    experts("EP2, allgather", 2, EP2 | layout(dispatcher="allgather"), True),
    experts("EP2, overlap", 2, EP2 | _OVERLAP_BOTH, bucket_size=SMALL_BUCKET),
    experts("TP2+SP", 2, layout(tp=2, sp=True)),
    experts("EP2 of TP2+SP", 2, EP2_TP2, True),
    experts("copied over TP2+SP", 2, layout(etp=1, tp=2, sp=True)),
    experts("TP2+SP, allgather", 2, layout(tp=2, sp=True, dispatcher="allgather")),
    experts("CP2", 2, layout(cp=2), True),
    experts("EP2 of CP2", 2, layout(cp=2, ep=2), balanced=False, micro_batch_size=2),
    experts("DP2", 2, {}),
    experts("PP2", 2, layout(pp=2)),
    experts("PP2 x VPP2", 2, layout(pp=2, vpp=2)),
    # tensor parallel
    Member("TP2", 2, layout(tp=2)),
    Member("TP2+SP", 2, layout(tp=2, sp=True)),
    Member("TP2+SP, micro batch 4, selective recompute", 2, layout(tp=2, sp=True) | _THREE, True, micro_batch_size=4),
    Member("TP2, vision TP1", 2, layout(tp=2, vision_tp=1), True, micro_batch_size=2),
    Member("TP2+SP, vision TP1", 2, layout(tp=2, sp=True, vision_tp=1)),
    Member("TP2, frozen vision", 2, layout(tp=2), against="frozen vision"),
    Member("LLaVA TP2+SP", 2, layout(tp=2, sp=True), True, "llava", micro_batch_size=4),
    Member("TP2+SP, logits in pieces", 2, layout(tp=2, sp=True), True, micro_batch_size=4, model=PIECES),
    Member("TP2, logits in pieces", 2, layout(tp=2), model=PIECES),
    Member("LLaVA TP2+SP, logits in pieces", 2, layout(tp=2, sp=True), False, "llava", model=PIECES),
    # pipeline
    Member("PP2 x VPP2, activations in CPU memory", 2, layout(pp=2, vpp=2, offload=True)),
    Member("PP2, logits in pieces", 2, layout(pp=2), model=PIECES),
    Member("PP2", 2, layout(pp=2)),
    Member("PP2, layers 1 + 3", 2, layout(pp=2, stages="Et|tttL"), quick=True),
    Member("PP2 x VPP2", 2, layout(pp=2, vpp=2), quick=True),
    Member("PP2, micro batch 4", 2, layout(pp=2), micro_batch_size=4),
    Member("PP2, frozen vision", 2, layout(pp=2), True, "frozen vision"),
    Member("PP2, frozen language model: a rank without anything to train", 2, layout(pp=2), True, "frozen language"),
    Member("PP2, frozen language model, optimizer not distributed", 2, layout(pp=2) | PLAIN, False, "frozen language"),
    Member("LLaVA PP2", 2, layout(pp=2), False, "llava"),
    # context parallel
    Member("CP2 all_gather", 2, layout(cp=2, cp_comm="all_gather"), quick=True),
    Member("CP2 p2p", 2, layout(cp=2, cp_comm="p2p")),
    Member("CP2 p2p, micro batch 4", 2, layout(cp=2, cp_comm="p2p"), True, micro_batch_size=4),
    Member("CP2 all_gather, recompute full", 2, layout(cp=2, cp_comm="all_gather") | _FULL),
    Member("LLaVA CP2 all_gather", 2, layout(cp=2, cp_comm="all_gather"), True, "llava", micro_batch_size=4),
    Member("LLaVA CP2 p2p", 2, layout(cp=2, cp_comm="p2p"), False, "llava"),
    Member("CP2, logits in pieces", 2, layout(cp=2), model=PIECES),
    # data parallel
    Member("DP2, overlap, logits in pieces", 2, _OVERLAP_BOTH, True, bucket_size=SMALL_BUCKET, model=PIECES),
    Member("DP2", 2, PLAIN, quick=True),
    Member("DP2, overlap", 2, PLAIN | _OVERLAP, quick=True, bucket_size=SMALL_BUCKET),
    Member("DP2, distributed optimizer", 2, {}, quick=True),
    Member("DP2, distributed optimizer, overlap", 2, _OVERLAP_BOTH, quick=True, bucket_size=SMALL_BUCKET),
    Member("DP2, distributed optimizer, gradient overlap only", 2, _OVERLAP, bucket_size=SMALL_BUCKET),
    Member("DP2, frozen vision, overlap", 2, _OVERLAP_BOTH, False, "frozen vision", bucket_size=SMALL_BUCKET),
    # rates, times and limits of layers
    Member("schedules: TP2+SP", 2, layout(tp=2, sp=True), True, "schedules", micro_batch_size=2),
    Member("schedules: PP2 x VPP2", 2, layout(pp=2, vpp=2), True, "schedules"),
    Member("schedules: DP2, overlap", 2, _OVERLAP_BOTH, True, "schedules", bucket_size=SMALL_BUCKET),
    Member("schedules: DP2, optimizer not distributed", 2, PLAIN, False, "schedules"),
    Member("schedules: CP2 p2p", 2, layout(cp=2, cp_comm="p2p"), False, "schedules"),
    Member("schedules: encoder in bubbles, PP2", 2, layout(placement="bubble", pp=2), False, "schedules"),
    Member("schedules: EP2", 2, EP2, True, "schedules, experts"),
    Member("schedules: EP2 of TP2+SP", 2, EP2_TP2, False, "schedules, experts"),
    # weights of tasks, boxes
    Member("tasks by uncertainty, packed by cost", 1, {}, False, "tasks by uncertainty", data=PACKED),
    Member("tasks by uncertainty, TP2+SP", 2, layout(tp=2, sp=True), False, "tasks by uncertainty", micro_batch_size=2),
    Member("tasks by uncertainty, PP2", 2, layout(pp=2), True, "tasks by uncertainty"),
    Member("tasks by gradnorm, TP2+SP", 2, layout(tp=2, sp=True), True, "tasks by gradnorm", micro_batch_size=2),
    Member(
        "tasks by gradnorm, CP2 p2p, packed by cost",
        2,
        layout(cp=2, cp_comm="p2p"),
        True,
        "tasks by gradnorm",
        data=PACKED,
    ),
    Member("tasks by gradnorm, PP2 x VPP2", 2, layout(pp=2, vpp=2), False, "tasks by gradnorm"),
    Member("tasks by gradnorm, DP2", 2, {}, False, "tasks by gradnorm"),
    Member("tasks by loss ratio, DP2, overlap", 2, _OVERLAP_BOTH, True, "tasks by loss ratio"),
    Member("boxes TP2+SP, logits in pieces", 2, layout(tp=2, sp=True), True, "boxes", micro_batch_size=4, model=PIECES),
    Member("boxes CP2 p2p", 2, layout(cp=2, cp_comm="p2p"), True, "boxes", micro_batch_size=4),
    Member("boxes PP2, packed by cost", 2, layout(pp=2), False, "boxes", data=PACKED),
    Member("boxes DP2", 2, {}, False, "boxes"),
    # adapters
    Member("LoRA TP2+SP, recompute full", 2, layout(tp=2, sp=True) | _FULL, True, "LoRA"),
    Member("LoRA TP2, vision TP1", 2, layout(tp=2, vision_tp=1), False, "LoRA"),
    Member("LoRA PP2", 2, layout(pp=2), False, "LoRA"),
    Member("LoRA PP2 x VPP2", 2, layout(pp=2, vpp=2), True, "LoRA"),
    Member("LoRA CP2 p2p, packed by cost", 2, layout(cp=2, cp_comm="p2p"), True, "LoRA", data=PACKED),
    Member("LoRA DP2, distributed optimizer, overlap", 2, _OVERLAP_BOTH, True, "LoRA", bucket_size=SMALL_BUCKET),
    Member("LoRA encoder in bubbles, PP2", 2, layout(placement="bubble", pp=2), True, "LoRA"),
    Member("DoRA TP2+SP", 2, layout(tp=2, sp=True), True, "DoRA", micro_batch_size=2),
    Member("DoRA PP2", 2, layout(pp=2), False, "DoRA"),
    Member("QLoRA TP2+SP", 2, layout(tp=2, sp=True), True, "QLoRA", micro_batch_size=2),
    Member(
        "QLoRA, encoder in bubbles, PP2, recompute full", 2, layout(placement="bubble", pp=2) | _FULL, False, "QLoRA"
    ),
    Member("IA3 TP2+SP", 2, layout(tp=2, sp=True), True, "IA3", micro_batch_size=2),
    Member("IA3 CP2 p2p", 2, layout(cp=2, cp_comm="p2p"), False, "IA3"),
    Member("adapters TP2+SP", 2, layout(tp=2, sp=True), True, "adapters", micro_batch_size=2),
    Member("adapters TP2, selective recompute", 2, layout(tp=2) | _THREE, False, "adapters"),
    Member("adapters PP2 x VPP2", 2, layout(pp=2, vpp=2), False, "adapters"),
    Member("prefix TP2+SP", 2, layout(tp=2, sp=True), True, "prefix", micro_batch_size=2),
    Member("prefix CP2 all_gather", 2, layout(cp=2, cp_comm="all_gather"), True, "prefix"),
    Member("prefix of the tower, TP2", 2, layout(tp=2), True, "prefix of the tower, frozen language"),
    Member("prefix TP4 with 2 key-value heads", 4, layout(tp=4), False, "prefix"),
    Member("LoRA on experts, EP2 of TP2+SP", 2, EP2_TP2, True, "LoRA on experts"),
    Member("LoRA on experts, TP2+SP", 2, layout(tp=2, sp=True), True, "LoRA on experts"),
    Member("LoRA on experts, EP2", 2, EP2, False, "LoRA on experts"),
    # the encoder's places
    Member("encoder stage + PP1", 2, layout(placement="stage", pp=2), quick=True),
    Member("encoder stage + PP1, frozen vision", 2, layout(placement="stage", pp=2), False, "frozen vision"),
    Member("encoder stage + PP1, frozen language model", 2, layout(placement="stage", pp=2), True, "frozen language"),
    Member("encoder stage + PP1, frozen encoder", 2, layout(placement="stage", pp=2), True, "frozen encoder"),
    Member("encoder stage + PP1, LLaVA", 2, layout(placement="stage", pp=2), False, "llava"),
    Member("encoder spread, PP2", 2, layout(placement="spread", pp=2), quick=True),
    Member("encoder spread, PP2, frozen encoder", 2, layout(placement="spread", pp=2), False, "frozen encoder"),
    Member("encoder spread twice, DP2", 2, layout(placement="spread", encode_twice=True), quick=True),
    Member("encoder spread, CP2 p2p", 2, layout(placement="spread", cp=2, cp_comm="p2p"), True, micro_batch_size=4),
    Member("encoder spread, TP2+SP, vision TP1", 2, layout(placement="spread", tp=2, sp=True, vision_tp=1), True),
    Member("encoder spread, DP2, recompute full", 2, layout(placement="spread") | _FULL),
    Member("encoder in bubbles, PP2", 2, layout(placement="bubble", pp=2), quick=True),
    # windows
    Member("Qwen2.5-VL TP2+SP", 2, layout(tp=2, sp=True), False, "qwen2_5_vl"),
    Member("Qwen2.5-VL CP2 all_gather", 2, layout(cp=2, cp_comm="all_gather"), False, "qwen2_5_vl"),
    Member("Qwen2.5-VL PP2", 2, layout(pp=2), False, "qwen2_5_vl"),
    Member("Qwen2.5-VL, encoder spread, PP2", 2, layout(placement="spread", pp=2), False, "qwen2_5_vl"),
    Member("Qwen2.5-VL, encoder on own rank", 2, layout(placement="own_ranks"), False, "qwen2_5_vl"),
    Member("Qwen2.5-VL, encoder in bubbles, PP2", 2, layout(placement="bubble", pp=2), True, "qwen2_5_vl"),
    Member("Qwen2.5-VL, 2 encoder stages + PP1", 3, layout(placement="stage", pp=3, vision_pp=2), True, "qwen2_5_vl"),
    # tiles
    Member("InternVL TP2+SP", 2, layout(tp=2, sp=True), False, "internvl"),
    Member("InternVL CP2 all_gather", 2, layout(cp=2, cp_comm="all_gather"), False, "internvl"),
    Member("InternVL PP2", 2, layout(pp=2), False, "internvl"),
    Member("InternVL, encoder stage + PP1", 2, layout(placement="stage", pp=2), False, "internvl"),
    Member("InternVL, encoder spread, PP2", 2, layout(placement="spread", pp=2), True, "internvl"),
    Member("InternVL, encoder on own rank", 2, layout(placement="own_ranks"), False, "internvl"),
    Member(
        "InternVL, encoder in bubbles, TP2+SP x PP2",
        4,
        layout(placement="bubble", tp=2, sp=True, pp=2),
        True,
        "internvl",
    ),
    # norms over heads that tensor parallelism shares out
    Member("InternVL 6B TP2+SP", 2, layout(tp=2, sp=True), True, "internvl_6b"),
    Member("InternVL 6B TP2, recompute full", 2, layout(tp=2) | _FULL, False, "internvl_6b"),
    # composed models
    Member("perceiver, TP2+SP", 2, layout(tp=2, sp=True), True, "perceiver"),
    Member("perceiver, encoder in bubbles, PP2", 2, layout(placement="bubble", pp=2), True, "perceiver"),
    Member("perceiver, encoder stage + PP1", 2, layout(placement="stage", pp=2), False, "perceiver"),
    Member("gated cross-attention, TP2+SP", 2, layout(tp=2, sp=True), False, "gated_cross_attention"),
    Member(
        "gated cross-attention, CP2 all_gather", 2, layout(cp=2, cp_comm="all_gather"), True, "gated_cross_attention"
    ),
    Member("gated cross-attention, CP2 p2p", 2, layout(cp=2, cp_comm="p2p"), False, "gated_cross_attention"),
    Member("gated cross-attention, PP2 x VPP2", 2, layout(pp=2, vpp=2), False, "gated_cross_attention"),
    Member("gated cross-attention, DP2, overlap", 2, _OVERLAP_BOTH, False, "gated_cross_attention"),
    Member(
        "gated cross-attention, encoder in bubbles, PP2",
        2,
        layout(placement="bubble", pp=2),
        False,
        "gated_cross_attention",
    ),
    Member("qformer, CP2 all_gather", 2, layout(cp=2, cp_comm="all_gather"), False, "qformer"),
    Member("qformer, encoder spread, PP2", 2, layout(placement="spread", pp=2), True, "qformer"),
    Member("qformer, encoder on own rank", 2, layout(placement="own_ranks"), False, "qformer"),
    Member("encoder in bubbles, PP2, bound 2", 2, layout(placement="bubble", pp=2, max_live=2)),
    Member("encoder in bubbles twice, PP2", 2, layout(placement="bubble", pp=2, encode_twice=True), quick=True),
    Member("encoder in bubbles, PP2, frozen vision", 2, layout(placement="bubble", pp=2), False, "frozen vision"),
    Member("encoder in bubbles, PP2, frozen encoder", 2, layout(placement="bubble", pp=2), True, "frozen encoder"),
    Member("encoder in bubbles, PP2 x VPP2", 2, layout(placement="bubble", pp=2, vpp=2), quick=True),
    Member("encoder in bubbles, PP2, LLaVA", 2, layout(placement="bubble", pp=2), True, "llava"),
    Member("encoder on own rank + one", 2, layout(placement="own_ranks"), quick=True),
    Member("encoder on own rank + one, frozen encoder", 2, layout(placement="own_ranks"), False, "frozen encoder"),
    Member("encoder on own rank + PP2", 3, layout(placement="own_ranks", pp=2), quick=True),
    Member("encoder on own rank + DP2", 3, layout(placement="own_ranks"), True, micro_batch_size=2),
    Member("encoder on own ranks DP2 + one", 3, layout(placement="own_ranks", vision_dp=2)),
    Member("encoder on own ranks TP2 + one", 3, layout(placement="own_ranks", vision_tp=2), True),
    Member("encoder on own rank + TP2+SP", 3, layout(placement="own_ranks", tp=2, sp=True)),
    Member("encoder on own rank + CP2", 3, layout(placement="own_ranks", cp=2), micro_batch_size=4),
    Member("packed by cost, DP2", 2, data=PACKED),
    Member("mixture with a curriculum: DP2", 2, quick=True, against="mixture", micro_batch_size=2),
    Member("mixture with a curriculum: packed by cost, DP2", 2, against="mixture", data=PACKED),
    Member("packed by cost, encoder in bubbles, PP2 x VPP2", 2, layout(placement="bubble", pp=2, vpp=2), data=PACKED),
    Member("LLaVA-NeXT TP2+SP", 2, layout(tp=2, sp=True), against="llava_next", micro_batch_size=2),
    Member("LLaVA-NeXT CP2 all_gather", 2, layout(cp=2), True, "llava_next"),
    Member("LLaVA-NeXT, encoder spread, PP2", 2, layout(placement="spread", pp=2), against="llava_next"),
    Member("LLaVA-NeXT, 2 encoder stages + PP1", 3, layout(placement="stage", pp=3, vision_pp=2), against="llava_next"),
    Member("LLaVA-OneVision PP2", 2, layout(pp=2), against="llava_onevision"),
    Member("LLaVA-OneVision, encoder in bubbles, PP2", 2, layout(placement="bubble", pp=2), True, "llava_onevision"),
    Member("LLaVA-OneVision, encoder on own rank", 2, layout(placement="own_ranks"), against="llava_onevision"),
    # training methods: spots
    Member("sft with every knob: TP2+SP", 2, layout(tp=2, sp=True), True, "sft with every knob"),
    Member("sft with every knob: CP2", 2, layout(cp=2), True, "sft with every knob", micro_batch_size=2),
    Member("sft with every knob: PP2 x VPP2", 2, layout(pp=2, vpp=2), False, "sft with every knob"),
    Member("sft with every knob: DP2, packed by cost", 2, against="sft with every knob", data=PACKED),
    Member("rm: TP2+SP", 2, layout(tp=2, sp=True), True, "rm", micro_batch_size=2),
    Member("rm: PP2, encoder in bubbles", 2, layout(placement="bubble", pp=2), True, "rm"),
    Member("rm: CP2 p2p", 2, layout(cp=2, cp_comm="p2p"), True, "rm", micro_batch_size=4),
    Member("rm: DP2, packed by cost", 2, against="rm", data=PACKED_PAIRS),
    Member("rm, untied, LLaVA: PP2", 2, layout(pp=2), True, "rm, untied"),
    Member("rm, untied, LLaVA: CP2", 2, layout(cp=2), False, "rm, untied"),
    Member("prm: TP2+SP", 2, layout(tp=2, sp=True), True, "prm", micro_batch_size=2),
    Member("prm: PP2", 2, layout(pp=2), False, "prm"),
    Member("prm: CP2, packed by cost", 2, layout(cp=2), True, "prm", data=PACKED),
    Member("dpo: TP2+SP", 2, layout(tp=2, sp=True), True, "dpo"),
    Member("dpo: PP2 x VPP2", 2, layout(pp=2, vpp=2), True, "dpo"),
    Member("dpo: CP2 all_gather", 2, layout(cp=2), True, "dpo", micro_batch_size=2),
    Member("dpo: DP2, packed by cost", 2, against="dpo", quick=True, data=PACKED_PAIRS),
    Member("dpo: encoder on own rank + one", 2, layout(placement="own_ranks"), False, "dpo"),
    Member("dpo: encoder spread, PP2", 2, layout(placement="spread", pp=2), False, "dpo"),
    Member("dpo: encoder stage + PP1", 2, layout(placement="stage", pp=2), False, "dpo", micro_batch_size=2),
    Member("dpo, adapters off: PP2 x VPP2", 2, layout(pp=2, vpp=2), True, "dpo, adapters off"),
    Member("dpo, adapters off: TP2+SP", 2, layout(tp=2, sp=True), True, "dpo, adapters off", micro_batch_size=2),
    Member("dpo, adapters off: CP2, packed by cost", 2, layout(cp=2), False, "dpo, adapters off", data=PACKED_PAIRS),
    Member("simpo: CP2 p2p", 2, layout(cp=2, cp_comm="p2p"), True, "simpo"),
    Member("simpo: PP2, encoder in bubbles", 2, layout(placement="bubble", pp=2), False, "simpo"),
    Member("orpo: TP2", 2, layout(tp=2), False, "orpo"),
    Member("kto: CP2 all_gather", 2, layout(cp=2), True, "kto", micro_batch_size=2),
    Member("kto: PP2, encoder in bubbles", 2, layout(placement="bubble", pp=2), True, "kto"),
    Member("kto: TP2+SP", 2, layout(tp=2, sp=True), False, "kto", micro_batch_size=4),
    Member("kto: DP2, packed by cost", 2, against="kto", data=PACKED_PAIRS),
    Member("contrastive: micro batch 4", 1, {}, False, "contrastive", micro_batch_size=4),
    Member("contrastive: TP2+SP", 2, layout(tp=2, sp=True), True, "contrastive", micro_batch_size=2),
    Member("contrastive: PP2 x VPP2", 2, layout(pp=2, vpp=2), False, "contrastive"),
    Member("contrastive: PP2, encoder in bubbles", 2, layout(placement="bubble", pp=2), False, "contrastive"),
    Member("contrastive: CP2 p2p", 2, layout(cp=2, cp_comm="p2p"), True, "contrastive", micro_batch_size=4),
    Member("contrastive: DP2, packed by cost", 2, against="contrastive", data=PACKED_PAIRS),
    Member("contrastive: encoder on own rank + DP2", 3, layout(placement="own_ranks"), False, "contrastive"),
    Member("contrastive, sigmoid: PP2", 2, layout(pp=2), True, "contrastive, sigmoid"),
    Member("contrastive, sigmoid: DP2, distributed optimizer", 2, {}, False, "contrastive, sigmoid"),
    Member("orpo: PP2 x DP2", 4, layout(pp=2), True, "orpo"),
    Member("dpo: TP2+SP x CP2", 4, layout(tp=2, sp=True, cp=2), False, "dpo"),
    # four ranks
    Member("mixture with a curriculum: packed by cost, PP2 x DP2", 4, layout(pp=2), True, "mixture", data=PACKED),
    Member("packed by cost, encoder spread, PP2 x DP2", 4, layout(placement="spread", pp=2), True, data=PACKED),
    Member("3 encoder stages + PP1", 4, layout(placement="stage", pp=4, vision_pp=3)),
    Member("2 encoder stages + PP2", 4, layout(placement="stage", pp=4, vision_pp=2), quick=True),
    Member("2 encoder stages + PP2, LLaVA", 4, layout(placement="stage", pp=4, vision_pp=2), True, "llava"),
    Member("encoder stage + PP1, TP2+SP", 4, layout(placement="stage", pp=2, tp=2, sp=True), True, micro_batch_size=2),
    Member("encoder stage TP1 + PP1 TP2", 4, layout(placement="stage", pp=2, tp=2, vision_tp=1), micro_batch_size=2),
    Member("encoder stage + PP1, CP2", 4, layout(placement="stage", pp=2, cp=2), True, micro_batch_size=2),
    Member("encoder stage + PP3, layers 1 + 2 + 1", 4, layout(placement="stage", pp=4, stages="Et|tt|tL")),
    Member(
        "encoder stage + PP1, DP2, overlap",
        4,
        layout(placement="stage", pp=2) | _OVERLAP_BOTH,
        bucket_size=SMALL_BUCKET,
    ),
    Member(
        "encoder spread, PP2 x DP2, overlap",
        4,
        layout(placement="spread", pp=2) | _OVERLAP_BOTH,
        True,
        bucket_size=SMALL_BUCKET,
    ),
    Member("encoder spread, PP2 x DP2, optimizer not distributed", 4, layout(placement="spread", pp=2) | PLAIN),
    Member("encoder spread, CP2 x DP2", 4, layout(placement="spread", cp=2)),
    Member("encoder spread, TP2+SP x PP2", 4, layout(placement="spread", tp=2, sp=True, pp=2), micro_batch_size=2),
    Member(
        "encoder in bubbles, PP4, one more in flight",
        4,
        layout(placement="bubble", pp=4, extra_in_flight=1),
        quick=True,
    ),
    Member("encoder in bubbles, PP4, bound 4", 4, layout(placement="bubble", pp=4, max_live=4), quick=True),
    Member(
        "encoder in bubbles, TP2+SP x PP2", 4, layout(placement="bubble", tp=2, sp=True, pp=2), True, micro_batch_size=2
    ),
    Member("encoder in bubbles, TP2 x PP2, vision TP1", 4, layout(placement="bubble", tp=2, pp=2, vision_tp=1)),
    Member("encoder in bubbles, CP2 x PP2", 4, layout(placement="bubble", cp=2, pp=2), True, micro_batch_size=2),
    Member(
        "encoder in bubbles, PP2 x VPP2 x DP2, overlap",
        4,
        layout(placement="bubble", pp=2, vpp=2) | _OVERLAP_BOTH,
        bucket_size=SMALL_BUCKET,
    ),
    Member(
        "encoder in bubbles, PP2 x DP2, optimizer not distributed", 4, layout(placement="bubble", pp=2) | PLAIN, True
    ),
    Member(
        "encoder on own ranks DP2 + TP2", 4, layout(placement="own_ranks", vision_dp=2, tp=2), True, micro_batch_size=2
    ),
    Member("encoder on own ranks TP2 + DP2", 4, layout(placement="own_ranks", vision_tp=2)),
    Member(
        "encoder on own ranks DP2 + PP2, LLaVA", 4, layout(placement="own_ranks", vision_dp=2, pp=2), False, "llava"
    ),
    Member("TP4 with 2 key-value heads", 4, layout(tp=4), True, micro_batch_size=8),
    Member("TP4 with 2 key-value heads, micro batch 1", 4, layout(tp=4)),
    Member("TP4+SP with 2 key-value heads", 4, layout(tp=4, sp=True), micro_batch_size=4),
    Member("PP4", 4, layout(pp=4), quick=True),
    Member("PP2 x DP2, overlap", 4, layout(pp=2) | _OVERLAP_BOTH, True, bucket_size=SMALL_BUCKET),
    Member("CP4 all_gather", 4, layout(cp=4, cp_comm="all_gather"), micro_batch_size=2),
    Member("CP4 p2p", 4, layout(cp=4, cp_comm="p2p"), True, micro_batch_size=4),
    Member("CP2 x DP2, optimizer not distributed", 4, layout(cp=2, cp_comm="p2p") | PLAIN, True, micro_batch_size=2),
    Member("TP2 x PP2", 4, layout(tp=2, pp=2)),
    Member("TP2+SP x PP2, recompute full", 4, layout(tp=2, sp=True, pp=2) | _FULL, True, micro_batch_size=4),
    Member("TP2 x PP2, recompute full", 4, layout(tp=2, pp=2) | _FULL),
    Member("TP2+SP x PP2 x VPP2", 4, layout(tp=2, sp=True, pp=2, vpp=2), micro_batch_size=2),
    Member("TP2 x PP2, vision TP1", 4, layout(tp=2, pp=2, vision_tp=1), micro_batch_size=2),
    Member("TP2 x CP2", 4, layout(tp=2, cp=2)),
    Member("TP2+SP x CP2", 4, layout(tp=2, sp=True, cp=2), True, micro_batch_size=4),
    Member("TP2+SP x CP2 p2p", 4, layout(tp=2, sp=True, cp=2, cp_comm="p2p"), micro_batch_size=2),
    Member("CP2 x PP2", 4, layout(cp=2, pp=2), True, micro_batch_size=2),
    Member("CP2 p2p x PP2 x VPP2", 4, layout(cp=2, cp_comm="p2p", pp=2, vpp=2)),
    Member("TP2+SP x DP2, distributed optimizer", 4, layout(tp=2, sp=True), True, micro_batch_size=4),
    Member("schedules: TP2+SP x PP2", 4, layout(tp=2, sp=True, pp=2), False, "schedules", micro_batch_size=2),
    Member("LLaVA TP2 x PP2", 4, layout(tp=2, pp=2), True, "llava", micro_batch_size=2),
    experts("EP4", 4, layout(ep=4)),
    experts("EP2 x DP2, optimizer not distributed", 4, EP2 | PLAIN),
    experts("EP2 of DP2 x PP2, encoder in bubbles", 4, EP2 | layout(pp=2, placement="bubble"), True),
    experts("EP4 of TP2+SP x DP2", 4, layout(ep=4, etp=1, tp=2, sp=True), micro_batch_size=1),
    experts("EP2 x TP2+SP", 4, layout(ep=2, tp=2, sp=True)),
    experts("EP2 of CP2 x DP2, allgather", 4, layout(ep=2, cp=2, dispatcher="allgather")),
    experts("EP2 of TP2+SP x PP2, encoder spread", 4, EP2_TP2 | layout(pp=2, placement="spread"), balanced=False),
    experts("EP2 of DP2, encoder on own ranks DP2", 4, EP2 | layout(placement="own_ranks", vision_dp=2)),
    # eight ranks
    experts("EP2 of TP2+SP x PP2 x DP2, overlap", 8, EP2_TP2 | layout(pp=2) | _OVERLAP_BOTH),
    Member("2 encoder stages + PP2, TP2+SP", 8, layout(placement="stage", pp=4, vision_pp=2, tp=2, sp=True)),
    Member("encoder spread, TP2+SP x PP2 x DP2", 8, layout(placement="spread", tp=2, sp=True, pp=2)),
    Member(
        "encoder in bubbles, TP2+SP x PP2 x DP2, overlap",
        8,
        layout(placement="bubble", tp=2, sp=True, pp=2) | _OVERLAP_BOTH,
        bucket_size=SMALL_BUCKET,
    ),
    Member("encoder in bubbles, CP2 x PP2 x DP2", 8, layout(placement="bubble", cp=2, pp=2)),
    Member(
        "encoder on own ranks TP2 x DP2 + PP2 x DP2", 8, layout(placement="own_ranks", vision_tp=2, vision_dp=2, pp=2)
    ),
    Member("TP2 x PP2 x DP2", 8, layout(tp=2, pp=2)),
    Member("TP2+SP x PP2 x DP2, overlap", 8, layout(tp=2, sp=True, pp=2) | _OVERLAP_BOTH, bucket_size=SMALL_BUCKET),
)


def parallel_config(member: Member) -> ParallelConfig:
    """The member's layout."""
    return ParallelConfig(**member.parallel)
