"""Adapters are named by transformers' modules: a family knows the name in memory of everything in its weight map."""

import pytest

from tests.parity import cases
from tests.parity.conftest import WRITERS
from tests.parity.reference import load_reference


@pytest.mark.parametrize("family", WRITERS)
def test_names_in_memory(family, model_dirs, workers):
    model = load_reference(model_dirs[family])
    (names,) = workers(1).run(cases.memory_names, hf_dir=model_dirs[family])
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(names) | tied == {name for name, _ in model.named_parameters(remove_duplicate=False)} | tied
    assert len(names) == len(set(names))
