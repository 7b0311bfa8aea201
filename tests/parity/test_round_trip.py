"""Hugging Face directory to our parameters and back: not a bit of difference, and transformers loads the result."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.evidence import record, row
from tests.parity import cases
from tests.parity.conftest import WRITERS
from tests.parity.test_families import COMMAND
from tests.tiny import transpose_experts, write_tiny_qwen3vl_moe

pytestmark = pytest.mark.next_core

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ONE_FILE, MANY_FILES = 5 * 2**30, 100_000


def check(report, native_dtype):
    assert report["tensors"] > 50 and report["dtype"] == {str(native_dtype)}
    assert not report["one side only"] and not report["different"] and not report["different native"], report


def load(hf_dir, dtype):
    model, info = AutoModelForImageTextToText.from_pretrained(hf_dir, dtype=dtype, output_loading_info=True)
    problems = {key: value for key, value in info.items() if value}
    assert not problems, problems
    return model.state_dict()


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("family", WRITERS)
def test_export_equals_what_was_loaded(family, precision, tie, tmp_path, workers):
    dtype = DTYPES[precision]
    source = WRITERS[family](tmp_path / "source", tie=tie, dtype=dtype)
    report = workers(1).run(cases.round_trip, hf_dir=source, out_dir=tmp_path / "out", max_shard_bytes=ONE_FILE)[0]
    before, after = load(source, dtype), load(tmp_path / "out", dtype)
    same = set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    evidence = row(
        f"{family} {'tied' if tie else 'untied'} {precision}: tensors changed by HF -> native -> HF",
        len(report["different"]) + len(report["one side only"]),
        unit=f"of {report['tensors']} tensors",
        required="0",
        command=COMMAND,
    )
    record("parity", [evidence])
    check(report, dtype)
    assert same
    assert {path.name for path in source.iterdir()} == {path.name for path in (tmp_path / "out").iterdir()}
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        assert (source / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize("family", WRITERS)
def test_several_files_with_an_index(family, tmp_path, workers):
    source, out = WRITERS[family](tmp_path / "source"), tmp_path / "out"
    check(workers(1).run(cases.round_trip, hf_dir=source, out_dir=out, max_shard_bytes=MANY_FILES)[0], torch.float32)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    before, after = load(source, torch.float32), load(out, torch.float32)
    assert all(torch.equal(before[name], after[name]) for name in before)
    # once more, from several files into one
    again = tmp_path / "again"
    check(workers(1).run(cases.round_trip, hf_dir=out, out_dir=again, max_shard_bytes=ONE_FILE)[0], torch.float32)
    assert (again / "model.safetensors").is_file()


def test_experts_in_the_layout_of_transformers(tmp_path, workers):
    hub, other = write_tiny_qwen3vl_moe(tmp_path / "hub"), write_tiny_qwen3vl_moe(tmp_path / "other")
    transpose_experts(other)
    report = workers(1).run(cases.round_trip, hf_dir=other, out_dir=tmp_path / "out", max_shard_bytes=ONE_FILE)[0]
    num_stacks = 2 * 4  # of each layer
    assert len(report["different"]) == num_stacks and all(".mlp.experts." in name for name in report["different"])
    assert not report["one side only"] and not report["different native"]
    before, after = load(other, torch.float32), load(tmp_path / "out", torch.float32)
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    written, public = load_file(tmp_path / "out" / "model.safetensors"), load_file(hub / "model.safetensors")
    assert written.keys() == public.keys() and all(torch.equal(written[name], public[name]) for name in public)
