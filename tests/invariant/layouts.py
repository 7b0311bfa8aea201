"""What a member of the equivalence class is, and layouts by short names."""

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

FULL = layout(recompute="full", recompute_method="uniform", recompute_num_layers=1)
BLOCK = layout(recompute="full", recompute_method="block", recompute_num_layers=1)
CORE = layout(recompute="selective", recompute_modules=("core_attn",))
THREE = layout(recompute="selective", recompute_modules=("core_attn", "mlp", "layernorm"))
OVERLAP = layout(overlap_reduce=True)
OVERLAP_BOTH = layout(overlap_reduce=True, overlap_gather=True)
PLAIN = layout(sharded_optimizer=False)

# Rows of at most 160 tokens, split by cost (the longest sample has fewer).
PACKED = {"packing": True, "max_length": 160}
# All of one length.
FILLED = PACKED | {"packing_length": 200, "pad_to_packing_length": True}
PACKED_PAIRS = PACKED | {"packing_length": 320}

# Fewer tokens than any row has, and no divisor of their number.
PIECES = {"cross_entropy_loss_fusion": True, "cross_entropy_chunk_tokens": 19}

EP2 = layout(ep=2)
EP2_TP2 = layout(ep=2, etp=1, tp=2, sp=True)
MOE = layout(recompute="selective", recompute_modules=("core_attn", "moe", "layernorm"))


def experts(
    name: str, world_size: int, parallel: dict[str, Any], quick: bool = False, balanced: bool = True, **rest: Any
) -> Member:
    """A member with experts, whose load-balancing loss is learned, or not."""
    against = "experts balanced" if balanced else "experts"
    return Member(f"{against}: {name}", world_size, parallel, quick, against, **rest)


def parallel_config(member: Member) -> ParallelConfig:
    """The member's layout."""
    return ParallelConfig(**member.parallel)
