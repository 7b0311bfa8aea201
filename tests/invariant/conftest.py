from collections.abc import Callable
from pathlib import Path

import pytest

from tests.invariant import canon
from tests.invariant.measure import StepRow
from tests.invariant.references import REFERENCES
from tests.pool import PoolKeeper

Canonical = Callable[[str], list[StepRow]]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the models, images and rows of the canonical run."""
    root = tmp_path_factory.mktemp("invariant")
    canon.write_inputs(root)
    return root


@pytest.fixture(scope="session")
def canonical(workers: PoolKeeper, inputs: Path) -> Canonical:
    """Rows of a single-process run by its name in REFERENCES; each is run once."""
    done: dict[str, list[StepRow]] = {}

    def rows_of(name: str) -> list[StepRow]:
        if name not in done:
            recipe = canon.recipe_of(inputs, REFERENCES[name])
            (done[name],) = workers(1).run("tests.invariant.runs:train", recipe=recipe, num_steps=canon.NUM_STEPS)
        return done[name]

    return rows_of
