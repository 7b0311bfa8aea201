"""The planner's FLOPs against torch's own count of what our modules execute, for every family."""

from pathlib import Path

import pytest

from tests.invariant import canon
from tests.pool import PoolKeeper


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("flops")
    canon.write_inputs(root)
    return root


@pytest.mark.parametrize("family", canon.SENSITIVITY)
def test_formulas_are_what_torch_counts(workers: PoolKeeper, inputs: Path, family: str) -> None:
    recipe = canon.recipe(inputs, family, train={"micro_batch_size": 2})
    (found,) = workers(1).run("tests.distributed.flops_cases:count_step", recipe=recipe)
    for part, passes in found.items():
        assert passes, part
        for counted, predicted in passes:
            assert counted == predicted > 0, part
