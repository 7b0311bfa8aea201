"""Which modules a backend gives, and what it says where it cannot."""

import logging
from typing import Any

import pytest

from tests import contracts
from tests.pool import PoolKeeper, WorkerError

OLD, NEWEST = contracts.TRANSFORMER_ENGINE


def without_packages(backend: str) -> str:
    """The error of a backend whose package is not there."""
    from megavlm.errors import UseError
    from megavlm.models.specs import provider_of

    try:
        provider_of(backend)
    except UseError as error:
        return str(error)
    return ""


def build_attention(backend: str, **changes: Any) -> tuple[str, list[str]]:
    """Class of the core attention under a config, built twice, and what was logged."""
    import torch
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megavlm.config.schema import ParallelConfig
    from megavlm.models import kernels
    from megavlm.models.specs import provider_of
    from megavlm.parallel.groups import initialize
    from tests.stand_ins import flash

    parallel = {"context_parallel_size": changes.get("context_parallel_size", 1)}
    cp_comm_type = changes.pop("cp_comm_type", "p2p")
    groups = initialize(ParallelConfig(use_distributed_optimizer=False, **parallel)).language
    defaults: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 16,
    }
    defaults["attention_dropout"] = 0.0
    config = TransformerConfig(**defaults | {"params_dtype": torch.bfloat16, "bf16": True} | changes)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    kernels.logger.addHandler(handler)
    kernels.logger.setLevel(logging.INFO)
    kernels._say_once.cache_clear()
    with flash.installed():
        attention = provider_of(backend).core_attention()
        for _ in range(2):
            module = attention(
                config=config,
                layer_number=1,
                attn_mask_type=AttnMaskType.causal,
                attention_type="self",
                cp_comm_type=cp_comm_type,
                pg_collection=groups,
            )
    kernels.logger.removeHandler(handler)
    return type(module).__name__, said


@pytest.mark.parametrize(
    ("backend", "parts"),
    [
        ("te", ["transformer-engine", "not installed", "pip install --no-build-isolation"]),
        ("flash", ["flash-attn", "not installed", "pip install --no-build-isolation flash-attn"]),
    ],
)
def test_a_missing_package_is_an_error_with_its_command(workers: PoolKeeper, backend: str, parts: list[str]) -> None:
    (message,) = workers(1).run(without_packages, backend=backend)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("backend", "changes", "expected", "reason"),
    [
        ("te", {}, "TEDotProductAttention", ""),
        ("te", {"kv_channels": 12}, "PackedAttention", "head_dim 12 is no multiple of 8 up to 256"),
        ("te", {"kv_channels": 264}, "PackedAttention", "head_dim 264"),
        ("te", {"params_dtype": "fp32", "bf16": False}, "PackedAttention", "float32 is no half precision"),
        ("flash", {}, "FlashPackedAttention", ""),
        ("flash", {"kv_channels": 12}, "PackedAttention", "head_dim 12 is no multiple of 8 up to 256"),
    ],
)
def test_what_kernels_refuse_is_torchs_and_said_once(
    workers: PoolKeeper, backend: str, changes: dict[str, Any], expected: str, reason: str
) -> None:
    import torch

    changes = {key: torch.float32 if value == "fp32" else value for key, value in changes.items()}
    ((name, said),) = workers(1, OLD).run(build_attention, backend=backend, **changes)
    assert name == expected
    assert len(said) == bool(reason) and all(reason in text and f"model.backend={backend}" in text for text in said)


@pytest.mark.parametrize(
    ("version", "changes", "parts"),
    [
        (OLD, {"cp_comm_type": "all_gather"}, ["parallel.cp_comm_type", "all_gather with Transformer Engine 2.11.0"]),
        (OLD, {"cp_comm_type": "a2a", "num_query_groups": 1}, ["a2a with 1 key/value groups", "a multiple of 2"]),
        (OLD, {"cp_comm_type": "a2a", "kv_channels": 12}, ["a2a, and head_dim 12", "p2p or all_gather"]),
        (OLD, {"cp_comm_type": "a2a"}, []),
        (OLD, {"cp_comm_type": "p2p"}, []),
        (OLD, {"cp_comm_type": "all_gather", "kv_channels": 12}, []),
        (NEWEST, {"cp_comm_type": "all_gather"}, []),
    ],
)
def test_context_parallelism_that_a_version_lacks_is_an_error(
    workers: PoolKeeper, version: str, changes: dict[str, Any], parts: list[str]
) -> None:
    pool, arguments = workers(2, version), {"backend": "te", "context_parallel_size": 2, **changes}
    if not parts:
        assert pool.run(build_attention, **arguments)[0][0] in ("TEDotProductAttention", "PackedAttention")
        return
    with pytest.raises(WorkerError) as caught:
        pool.run(build_attention, **arguments)
    assert "UseError" in str(caught.value) and all(part in str(caught.value) for part in parts)
