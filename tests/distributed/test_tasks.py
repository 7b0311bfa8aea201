"""Weights of tasks and boxes from the command line: rows to log, evaluation, resume, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from tests.distributed.running import Inputs, call, log_rows, losses, succeed, the_error
from tests.pool import PoolKeeper
from tests.tiny_boxes import with_boxes

DP2: list[str] = []
TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]


@pytest.fixture(scope="module")
def rows(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of rows, and held-out ones that say what task they are of; all with boxes."""
    folder = tmp_path_factory.mktemp("tasks")
    random = np.random.RandomState(3)
    lines = []
    for number, line in enumerate(inputs.rows.read_text().splitlines()):
        row = json.loads(line)
        row["images"] = [str(inputs.root / image) for image in row["images"]]
        lines.append(with_boxes(row, number, random))
    names = ("docs", "charts", "nobody's", "")
    held_out: list[dict[str, Any]] = [row | {"channel": names[number % 4]} for number, row in enumerate(lines)]
    for name, part in {"docs": lines[:4], "charts": lines[4:], "held_out": held_out}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.fixture(scope="module")
def with_coordinates(inputs: Inputs, workers: PoolKeeper, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `inputs` with tokens for coordinates."""
    out = tmp_path_factory.mktemp("grown") / "model"
    words = ["add-tokens", "--coordinates", "--hf-dir", str(inputs.model("qwen3_vl")), "--out", str(out)]
    succeed(workers, 1, words)
    return out


def train_words(inputs: Inputs, out_dir: Path, rows: Path, *overrides: str) -> list[str]:
    mixture = ", ".join(f"{{name: {name}, paths: [{rows / name}.jsonl]}}" for name in ("docs", "charts"))
    common = ["data.train=[]", f"data.mixture=[{mixture}]", f"data.eval=[{rows}/held_out.jsonl]", "data.max_pixels=0"]
    return inputs.train(out_dir, *common, "data.box_format=bin_tokens_1000", *overrides)


def test_tasks_and_boxes_are_learned_logged_judged_and_resumed(
    inputs: Inputs, rows: Path, with_coordinates: Path, workers: PoolKeeper, tmp_path: Path
) -> None:
    sft = ["sft.task_weighting=uncertainty", "sft.task_weight_lr=0.3", "sft.box_loss_coeff=0.5"]
    words = [f"model.hf_dir={with_coordinates}", *sft, "optimizer.lr=1e-2", "checkpoint.save_steps=2"]
    words += ["optimizer.lr_decay_style=constant"]
    whole = tmp_path / "whole"
    succeed(workers, 2, train_words(inputs, whole, rows, *words, *DP2, "train.train_iters=5"))
    trained = [row for row in log_rows(whole) if row["kind"] == "train"]
    held_out = [row for row in log_rows(whole) if row["kind"] == "eval"]
    for name in ("docs", "charts"):
        assert trained[0]["extra"][f"task/{name}/weight"] == 1 > trained[-1]["extra"][f"task/{name}/weight"]
        assert held_out[-1][f"task/{name}/loss"] < held_out[0][f"task/{name}/loss"]
        assert held_out[-1][f"task/{name}/weight"] < 1
    assert trained[0]["extra"]["task/docs/loss"] != trained[0]["extra"]["task/charts/loss"]
    assert held_out[0]["box/count"] == 12 and held_out[-1]["box/l1"] < held_out[0]["box/l1"]
    # Judged without weights: the loss over all rows, also of those that no task has, and of their boxes.
    assert "task/nobody's/loss" not in held_out[0]

    parts = tmp_path / "parts"
    succeed(workers, 2, train_words(inputs, parts, rows, *words, *TP2, "train.train_iters=2"))
    succeed(workers, 2, train_words(inputs, parts, rows, *words, *DP2, "train.train_iters=5"))
    resumed = [row for row in log_rows(parts) if row["kind"] == "train"]
    assert [row["step"] for row in resumed] == [1, 2, 3, 4, 5]
    for row, other in zip(resumed, trained, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        for name in ("docs", "charts"):
            key = f"task/{name}/weight"
            assert row["extra"][key] == pytest.approx(other["extra"][key], rel=1e-6)
    code, _, err = workers(1).run(
        call, words=train_words(inputs, parts, rows, *words, "sft.task_weighting=fixed", "sft.task_weight_lr=0.025")
    )[0]
    assert code == 2
    the_error(err, "sft.task_weighting", "uncertainty of docs, charts", "keep it when resuming", only=False)


def test_a_model_without_coordinates_is_refused(
    inputs: Inputs, rows: Path, workers: PoolKeeper, tmp_path: Path
) -> None:
    for overrides in ([], ["sft.box_loss_coeff=1"]):
        code, _, err = workers(1).run(call, words=train_words(inputs, tmp_path, rows, *overrides))[0]
        assert code == 2
        the_error(err, "model.hf_dir", "no token <|0|>", "megavlm add-tokens --coordinates", only=False)
    words = train_words(inputs, tmp_path, rows, "data.box_format=grid_tokens_32")
    code, _, err = workers(1).run(call, words=words)[0]
    assert code == 2
    the_error(err, "model.hf_dir", "no token <patch_index_0000>", "megavlm add-tokens --grid", only=False)


def test_cells_of_a_grid_are_learned(inputs: Inputs, rows: Path, workers: PoolKeeper, tmp_path: Path) -> None:
    grown = tmp_path / "grown"
    succeed(workers, 1, ["add-tokens", "--grid", "--hf-dir", str(inputs.model("qwen3_vl")), "--out", str(grown)])
    words = [f"model.hf_dir={grown}", "data.box_format=grid_tokens_32", "optimizer.lr=1e-2"]
    out = tmp_path / "run"
    succeed(workers, 2, train_words(inputs, out, rows, *words, *TP2, "train.train_iters=4"))
    held_out = [row["loss"] for row in log_rows(out) if row["kind"] == "eval"]
    assert held_out[-1] < held_out[0]
    tokens = AutoTokenizer.from_pretrained(grown)
    (ids,) = tokens(["<object><patch_index_0044><patch_index_0863></object>"], add_special_tokens=False)["input_ids"]
    assert len(ids) == 4


def test_an_unknown_task_is_refused(inputs: Inputs, rows: Path, workers: PoolKeeper, tmp_path: Path) -> None:
    weights = ["sft.task_weighting=fixed", "sft.task_weights=[{name: ocr, weight: 2}]"]
    code, _, err = workers(1).run(call, words=train_words(inputs, tmp_path, rows, *weights))[0]
    assert code == 2
    the_error(err, "sft.task_weights[0].name", "`ocr`", "docs, charts")


@pytest.mark.parametrize("family", ["qwen3_vl", "llava", "qwen2_5_vl", "internvl"])
def test_tokens_are_added_to_a_model(inputs: Inputs, workers: PoolKeeper, tmp_path: Path, family: str) -> None:
    source, out = inputs.model(family), tmp_path / "grown"
    succeed(workers, 1, ["add-tokens", "<think>", "--coordinates", "--hf-dir", str(source), "--out", str(out)])
    model, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(out)
    text = "a<think><|7|><|999|>red"
    assert after.decode(after.encode(text, add_special_tokens=False), skip_special_tokens=True) == text
    assert len(after.encode("<think><|7|><|999|>", add_special_tokens=False)) == 3
    assert after.encode("the quick fox") == before.encode("the quick fox")
    assert after.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == before.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False
    )
    old, new = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(old) == set(new)
    grown = [name for name in old if old[name].shape != new[name].shape]
    assert grown and all(name.endswith(("embed_tokens.weight", "lm_head.weight")) for name in grown)
    for name in old:
        if name not in grown:
            assert torch.equal(old[name], new[name])
            continue
        used = len(before)
        assert torch.equal(new[name][:used], old[name][:used])
        assert len(new[name]) >= len(after) and len(new[name]) % 64 == 0
        torch.testing.assert_close(new[name][used:], old[name][:used].mean(0).expand(len(new[name]) - used, -1))
    assert model.get_input_embeddings().weight.shape[0] == model.config.get_text_config().vocab_size
    code, _, err = workers(1).run(call, words=["add-tokens", "--coordinates", "--hf-dir", str(out), "--out", str(out)])[
        0
    ]
    assert code == 2
    the_error(err, "is not empty")


def test_nothing_to_add_is_one_line(inputs: Inputs, workers: PoolKeeper, tmp_path: Path) -> None:
    common = ["--hf-dir", str(inputs.model("llava")), "--out", str(tmp_path / "out")]
    for words, part in (([], "nothing"), (["<image>"], "has these tokens"), ([" x"], "blanks")):
        code, _, err = workers(1).run(call, words=["add-tokens", *words, *common])[0]
        assert code == 2
        the_error(err, part)
    assert not losses(tmp_path)
