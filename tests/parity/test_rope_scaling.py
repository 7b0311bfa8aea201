"""Stretched rotary frequencies: what a recipe makes of config.json, read by transformers and by us, is one model."""

import json

import pytest

from megavlm.checkpoint.hf_io import read_rope_changes
from megavlm.config.load import recipe_from_dict
from megavlm.models.rope_config import with_text
from tests.evidence import record
from tests.parity import cases
from tests.parity.cases import TOLERANCES
from tests.parity.reference import load_reference, reference
from tests.parity.rows import DYNAMIC_ROWS, SQUARE_ROWS, synthetic_rows
from tests.parity.test_families import evidence_row, worst

pytestmark = pytest.mark.next_core

# An original context in which some frequencies of the tiny models turn often, and some not once.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "beta_fast": 8.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 64}
CASES = {
    "qwen3_vl yarn": ("qwen3_vl", {"rope_scaling": YARN}),
    "qwen2_5_vl yarn": ("qwen2_5_vl", {"rope_scaling": YARN | {"attention_factor": 0.9}}),
    "llava yarn": ("llava", {"rope_scaling": YARN}),
    "llava llama3": ("llava", {"rope_scaling": LLAMA3}),
    "qwen3_vl linear": ("qwen3_vl", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "qwen3_vl dynamic": ("qwen3_vl", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "qwen2_5_vl base": ("qwen2_5_vl", {"rope_theta": 5e4, "max_position_embeddings": 4096}),
}


@pytest.fixture(scope="module")
def stretched(model_dirs, tmp_path_factory):
    """A directory of a case: the family's weights, and config.json as an export of the recipe's run writes it."""
    root = tmp_path_factory.mktemp("stretched")

    def of(case):
        family, knobs = CASES[case]
        folder = root / case.replace(" ", "_")
        if not folder.exists():
            folder.mkdir()
            for file in model_dirs[family].iterdir():
                (folder / file.name).symlink_to(file)
            config = json.loads((folder / "config.json").read_text())
            changes = read_rope_changes(folder, recipe_from_dict({"model": knobs}).model)
            (folder / "config.json").unlink()
            (folder / "config.json").write_text(json.dumps(with_text(config, changes)))
        return folder

    return of


@pytest.mark.parametrize("case", CASES)
def test_stretched_models_equal_transformers(case, stretched, workers):
    hf_dir = stretched(case)
    model = load_reference(hf_dir)
    rows = synthetic_rows(workers(1).run(cases.input_spec, hf_dir=hf_dir)[0])
    chosen = list(SQUARE_ROWS if case.startswith("llava") else DYNAMIC_ROWS)[:2]
    expected = {name: (rows[name], reference(model, rows[name])) for name in chosen}
    (ours,) = workers(1).run(cases.compare, hf_dir=hf_dir, rows=expected, parallel={})
    figures = {figure: worst(list(ours.values()), figure) for figure in ("logits", "gradients")}
    record("parity", [evidence_row(f"{case}: {figure}, worst row", figure, value) for figure, value in figures.items()])
    assert all(value <= TOLERANCES[figure] for figure, value in figures.items()), figures


@pytest.mark.parametrize("case", [case for case in CASES if "dynamic" not in case])
def test_it_is_another_model_than_before(case, stretched, model_dirs, workers):
    """Frequencies that nobody reads would be equal on both sides, too."""
    family, _ = CASES[case]
    rows = synthetic_rows(workers(1).run(cases.input_spec, hf_dir=model_dirs[family])[0])
    name = next(iter(SQUARE_ROWS if family == "llava" else DYNAMIC_ROWS))
    before, after = (reference(load_reference(path), rows[name]) for path in (model_dirs[family], stretched(case)))
    assert (before.logits_TY - after.logits_TY).abs().max() > 100 * TOLERANCES["logits"]
