"""Knobs of Megatron-Core that users may type, and why a recipe has none of that name.

Files and lines are those of megatron-core 0.16.1. docs/gpu.md tells the same.
"""

from collections.abc import Mapping
from types import MappingProxyType

_GRAPHS = (
    "no CUDA graphs: packed rows have other borders each time, which graphs refuse (megatron-core 0.16.1, "
    "transformer/transformer_layer.py:1020 and transformer/cuda_graphs.py:1275), and they are made by its own "
    "pipeline schedules (pipeline_parallel/schedules.py:698)"
)
_FSDP = (
    "the distributed optimizer: Megatron-FSDP's mesh is data x tensor ranks of the whole world, without a pipeline or "
    "an encoder of its own (megatron-core 0.16.1, distributed/fsdp/mcore_fsdp_adapter.py:370), and its optimizer "
    "writes DTensors only (optimizer/distrib_optimizer.py:1229), not checkpoints that any layout loads"
)
NOT_OFFERED: Mapping[str, str] = MappingProxyType(
    {
        "cuda_graph_impl": _GRAPHS,
        "cuda_graph_scope": _GRAPHS,
        "enable_cuda_graph": _GRAPHS,
        "external_cuda_graph": _GRAPHS,
        "use_megatron_fsdp": _FSDP,
        "data_parallel_sharding_strategy": _FSDP,
        "use_torch_optimizer_for_cpu_offload": "nothing: with Adam it has no effect (megatron-core 0.16.1, "
        "optimizer/__init__.py:319)",
    }
)
"""Reasons by the last part of the key."""
