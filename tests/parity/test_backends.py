"""Every family with the backends `te` and `flash` against transformers, over stand-ins."""

import pytest

from tests.contracts import TRANSFORMER_ENGINE
from tests.invariant.canon import FULL_MATRIX
from tests.parity import cases
from tests.parity.cases import TOLERANCES
from tests.parity.conftest import WRITERS
from tests.parity.reference import load_reference, reference
from tests.parity.rows import synthetic_rows

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
# Across ranks, where what a family has of its own is split: DeepStack, experts, a norm over all heads.
SPLIT = tuple(WRITERS) if FULL_MATRIX else ("qwen3_vl", "qwen3_vl_moe", "internvl_6b")
CASES = [
    *(pytest.param(family, {}, id=f"{family}-TP1") for family in WRITERS),
    *(pytest.param(family, TP2, id=f"{family}-TP2+SP") for family in SPLIT),
]
TE_CALLS = ("LayerNormLinear.forward", "Linear.forward", "DotProductAttention.forward")


@pytest.fixture(scope="module")
def references(model_dirs, workers):
    """A row of each family with images and text, and what transformers makes of it."""
    made = {}

    def make(family):
        if family not in made:
            hf_dir = model_dirs[family]
            rows = synthetic_rows(workers(1).run(cases.input_spec, hf_dir=hf_dir)[0])
            name = next(iter(rows))
            made[family] = {name: (rows[name], reference(load_reference(hf_dir), rows[name]))}
        return made[family]

    return make


def check(results, expected_calls):
    for measured, calls in results:
        for figures in measured.values():
            for figure, tolerance in TOLERANCES.items():
                assert figures.get(figure, 0.0) <= tolerance, (figure, figures)
            assert {"logits", "loss", "gradients"} <= set(figures)
        assert all(calls.get(name, 0) > 0 for name in expected_calls), calls


@pytest.mark.next_core
@pytest.mark.parametrize(("family", "parallel"), CASES)
def test_te_equals_transformers(family, parallel, model_dirs, references, workers):
    version = TRANSFORMER_ENGINE[-1 if parallel else 0]
    results = workers(parallel.get("tensor_model_parallel_size", 1), version).run(
        "tests.stand_ins.running:run",
        name="tests.parity.cases:compare",
        hf_dir=model_dirs[family],
        rows=references(family),
        parallel=parallel,
        backend="te",
    )
    check(results, (*TE_CALLS, "GroupedLinear.forward") if family == "qwen3_vl_moe" else TE_CALLS)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "internvl_6b"])
def test_flash_equals_transformers(family, model_dirs, references, workers):
    results = workers(1).run(
        "tests.stand_ins.running:run",
        name="tests.parity.cases:compare",
        hf_dir=model_dirs[family],
        rows=references(family),
        parallel={},
        backend="flash",
    )
    check(results, ("flash_attn_varlen_func",))
