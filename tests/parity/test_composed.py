"""Composed models against the same pieces of transformers: every connector, with every kind of language model."""

import pytest

from tests.evidence import record
from tests.parity import cases
from tests.parity.cases import TOLERANCES
from tests.parity.composed import COMPOSED, ComposedReference
from tests.parity.reference import reference
from tests.parity.rows import synthetic_rows
from tests.parity.test_families import LAYOUTS, evidence_row, worst

pytestmark = pytest.mark.next_core


@pytest.fixture(scope="module", params=COMPOSED)
def composed(request, tmp_path_factory, workers):
    """(kind, directory, rows with what transformers makes of them)."""
    model = ComposedReference(request.param)
    hf_dir = model.write(tmp_path_factory.mktemp("composed") / request.param)
    rows = synthetic_rows(workers(1).run(cases.input_spec, hf_dir=hf_dir)[0])
    return request.param, hf_dir, {name: (items, reference(model, items)) for name, items in rows.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_equal_transformers(composed, layout, workers):
    kind, hf_dir, rows = composed
    parallel = LAYOUTS[layout]
    pool = workers(parallel.get("tensor_model_parallel_size", 1))
    ranks = pool.run(cases.compare, hf_dir=hf_dir, rows=rows, parallel=parallel)
    by_row = {name: [rank[name] for rank in ranks] for name in rows}
    name = f"connector {kind} + {COMPOSED[kind][0]} {layout}"
    record(
        "parity",
        [
            evidence_row(f"{name}: {figure}, worst row", figure, max(worst(ranks, figure) for ranks in by_row.values()))
            for figure in ("logits", "gradients", "loss")
        ],
    )
    for row, ranks in by_row.items():
        for figure, tolerance in TOLERANCES.items():
            if figure in ranks[0]:
                assert worst(ranks, figure) <= tolerance, (row, figure, ranks)
        assert {"logits", "gradients"} <= set(ranks[0]) and (row == "text only" or "features" in ranks[0])
        for rank in ranks:
            assert rank["compared"] + len(rank["unused there"] + rank["zero"]) == rank["entries"]
            if row not in ("text only", "image last"):
                assert all(parameter.startswith("vision.unused.") for parameter in rank["unused there"]), rank
