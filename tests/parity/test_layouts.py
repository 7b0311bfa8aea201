"""A training step of every family, in layouts that cut the model or the row, against transformers."""

import pytest

from tests.evidence import record
from tests.parity import cases
from tests.parity.cases import TOLERANCES
from tests.parity.conftest import WRITERS
from tests.parity.reference import load_reference, reference
from tests.parity.test_families import evidence_row

pytestmark = pytest.mark.next_core

LAYOUTS = {
    "PP2": {"pipeline_model_parallel_size": 2},
    "CP2": {"context_parallel_size": 2},
    "TP2+SP, encoder in bubbles of PP2": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "pipeline_model_parallel_size": 2,
        "vision_placement": "bubble",
    },
    "encoder stages 2 + PP1": {
        "pipeline_model_parallel_size": 3,
        "vision_pipeline_model_parallel_size": 2,
        "vision_placement": "stage",
    },
    "encoder spread, PP2": {"pipeline_model_parallel_size": 2, "vision_placement": "spread"},
    "encoder on own rank": {"vision_placement": "own_ranks"},
}
WORLDS = {"TP2+SP, encoder in bubbles of PP2": 4, "encoder stages 2 + PP1": 3}
_TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EXPERT_LAYOUTS = {
    "EP2": {"expert_model_parallel_size": 2},
    "EP2, allgather": {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "allgather"},
    "EP2 of TP2+SP": _TP2 | {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    "experts copied over TP2+SP": _TP2 | {"expert_tensor_parallel_size": 1},
}


@pytest.fixture(scope="module")
def expected(model_dirs, rows_file, workers):
    """Loss and gradients of all rows by transformers, by family."""
    result = {}
    for family, hf_dir in model_dirs.items():
        items = workers(1).run(cases.encode_rows, hf_dir=hf_dir, rows_file=rows_file)[0]
        result[family] = reference(load_reference(hf_dir), items)
    return result


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *((family, layout) for family in WRITERS for layout in LAYOUTS),
        *(("qwen3_vl_moe", layout) for layout in EXPERT_LAYOUTS),
    ],
)
def test_a_step_equals_transformers(family, layout, model_dirs, rows_file, expected, workers):
    ranks = workers(WORLDS.get(layout, 2)).run(
        cases.train_step_against,
        hf_dir=model_dirs[family],
        rows_file=rows_file,
        expected=expected[family],
        micro_batch_size=1,
        parallel=(LAYOUTS | EXPERT_LAYOUTS)[layout],
    )
    figures = {figure: max(rank[figure] for rank in ranks) for figure in ("loss", "gradients")}
    names = {figure: f"{family} {layout}: {figure}, training step on real images" for figure in figures}
    record("parity", [evidence_row(names[figure], figure, value) for figure, value in figures.items()])
    assert all(value <= TOLERANCES[figure] for figure, value in figures.items()), figures
    assert sum(rank["compared"] for rank in ranks) >= ranks[0]["entries"] - len(ranks[0]["unused here"]) - 18
