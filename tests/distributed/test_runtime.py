"""The pipeline runtime against Megatron-Core's own schedules: the same losses and gradients, bit for bit."""

from pathlib import Path
from typing import Any

import pytest

from tests.invariant import canon
from tests.pool import PoolKeeper

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any], int | None]] = {
    "PP2": (2, {"pipeline_model_parallel_size": 2}, None),
    "PP4": (4, {"pipeline_model_parallel_size": 4}, None),
    "PP2 x VPP2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, None),
    "TP2+SP x PP2": (4, TP2 | {"pipeline_model_parallel_size": 2}, None),
    "PP2 x DP2, overlap": (4, {"pipeline_model_parallel_size": 2, "overlap_grad_reduce": True}, 20_000),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runtime")
    canon.write_inputs(root)
    return root


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_megatron_bit_for_bit(inputs: Path, workers: PoolKeeper, name: str) -> None:
    world_size, parallel, bucket_size = LAYOUTS[name]
    results = workers(world_size).run(
        "tests.distributed.runtime_cases:both_ways",
        recipe=canon.recipe(inputs, parallel=parallel),
        bucket_size=bucket_size,
    )
    assert any(theirs for theirs, *_ in results)
    for theirs, ours, same, num_events in results:
        assert theirs == ours
        assert same and all(same), f"{same.count(False)} of {len(same)} gradients differ"
        assert num_events > 0


def test_a_message_that_does_not_come_is_named(inputs: Path, workers: PoolKeeper) -> None:
    recipe = canon.recipe(inputs, parallel={"pipeline_model_parallel_size": 2}, train={"distributed_timeout_s": 3})
    _, message = workers(2).run("tests.distributed.runtime_cases:lost_message", recipe=recipe)
    assert "rank 1 waited for receive(activation0 0>1) from rank 0" in message
