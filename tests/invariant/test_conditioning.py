"""The canonical runs are well-conditioned: rounding alone, which each layout and each processor does differently, must
not move them. Else a layout that is right could miss its limits, and one that is wrong could hide."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.invariant import canon
from tests.invariant.measure import LIMITS, StepRow, distances
from tests.pool import PoolKeeper

HALF_A_ROUNDING = 2.0**-24
SHARE_OF_LIMIT = 0.5
QUICK = ("llava_next",)
"""In `make test`; all in `make test-full`."""


def train(workers: PoolKeeper, root: Path, family: str) -> list[StepRow]:
    (rows,) = workers(1).run("tests.invariant.runs:train", recipe=canon.recipe(root, family), num_steps=canon.NUM_STEPS)
    return rows


@pytest.mark.parametrize("family", [name for name in canon.SENSITIVITY if canon.FULL_MATRIX or name in QUICK])
def test_a_rounding_of_every_weight_does_not_move_the_run(workers: PoolKeeper, tmp_path: Path, family: str) -> None:
    canon.write_inputs(tmp_path)
    before = train(workers, tmp_path, family)
    file = tmp_path / family / "model.safetensors"
    generator = torch.Generator().manual_seed(1)
    rounded = {}
    for name, weight in load_file(file).items():
        signs = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
        rounded[name] = weight * (1 + 2 * HALF_A_ROUNDING * signs)
        assert weight.ndim < 2 or not torch.equal(rounded[name], weight)
    save_file(rounded, file, metadata={"format": "pt"})
    measured = distances(train(workers, tmp_path, family), before)
    for measure in ("loss", "gradient norm"):
        assert measured[measure] <= SHARE_OF_LIMIT * LIMITS[measure], (measure, measured)
