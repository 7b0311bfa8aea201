"""A model whose loss computes the logits still answers, and is evaluated, as any other."""

from pathlib import Path
from typing import Any

import pytest

from tests.invariant import canon
from tests.pool import PoolKeeper


@pytest.mark.parametrize("world_size", [1, 2])
def test_answers_and_evaluations_are_the_same(workers: PoolKeeper, tmp_path: Path, world_size: int) -> None:
    canon.write_inputs(tmp_path)
    parallel: dict[str, Any] = {}
    if world_size == 2:
        parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    found = []
    for model in ({}, {"cross_entropy_loss_fusion": True, "cross_entropy_chunk_tokens": 7}):
        recipe = canon.recipe(
            tmp_path,
            model=model,
            parallel=parallel,
            data={"eval": (str(tmp_path / "first.jsonl"),)},
            observe={"report": True, "report_max_new_tokens": 5},
        )
        results = workers(world_size).run("tests.unit.train.pieces_cases:answers_and_evaluation", recipe=recipe)
        assert all(result == results[0] for result in results)
        found.append(results[0])
    (answers, loss), (answers_in_pieces, loss_in_pieces) = found
    assert answers_in_pieces == answers and len(answers) == 4 and any(answers)
    assert loss_in_pieces == pytest.approx(loss, rel=1e-6)
