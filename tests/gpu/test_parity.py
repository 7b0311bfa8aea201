"""Every family's first training step on a GPU, in fp32, against transformers on the CPU."""

from pathlib import Path

import pytest

from tests.gpu.conftest import Figures, GpuWorkers
from tests.parity import cases
from tests.parity.conftest import WRITERS
from tests.parity.reference import load_reference, reference

pytestmark = pytest.mark.gpu

LIMITS = {name: cases.TOLERANCES[name] for name in ("loss", "gradients")}


@pytest.mark.parametrize("family", WRITERS)
def test_first_step_equals_transformers(
    family: str,
    model_dirs: dict[str, Path],
    rows_file: Path,
    gpu_workers: GpuWorkers,
    figures: Figures,
) -> None:
    hf_dir = model_dirs[family]
    items = gpu_workers(1).run(cases.encode_rows, hf_dir=hf_dir, rows_file=rows_file)[0]
    expected = reference(load_reference(hf_dir), items)
    (measured,) = gpu_workers(1).run(
        cases.train_step_against, hf_dir=hf_dir, rows_file=rows_file, expected=expected, micro_batch_size=2
    )
    figures({name: float(measured[name]) for name in LIMITS}, LIMITS)
