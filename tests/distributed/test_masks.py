"""Masks from the command line: a token and a head, rows to log, evaluation, resume, export, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from megavlm.models.mask_head import NAMES
from tests.distributed.running import Inputs, call, log_rows, losses, succeed, the_error
from tests.pool import PoolKeeper
from tests.tiny_masks import with_masks

TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]
CP2 = ["parallel.context_parallel_size=2"]
LORA = ["peft.tuner_type=lora", "optimizer.lr=2e-3"]
FIGURES = {"mask/bce", "mask/dice", "mask/iou", "mask/count"}


@pytest.fixture(scope="module")
def rows(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with masks for the model of `inputs`; every second has an image and two masks."""
    random = np.random.RandomState(3)
    lines = []
    for number, line in enumerate(inputs.rows.read_text().splitlines()):
        row = json.loads(line)
        row["images"] = [str(inputs.root / image) for image in row["images"]]
        lines.append(json.dumps(with_masks(row, inputs.root, number // 2, random)) + "\n")
    path = tmp_path_factory.mktemp("masks") / "rows.jsonl"
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def grown(inputs: Inputs, workers: PoolKeeper, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `inputs` with a token for masks."""
    out = tmp_path_factory.mktemp("grown") / "model"
    succeed(workers, 1, ["add-tokens", "<seg>", "--hf-dir", str(inputs.model("qwen3_vl")), "--out", str(out)])
    return out


def _train(inputs: Inputs, hf_dir: Path, out_dir: Path, rows: Path, *words: str) -> list[str]:
    common = [f"model.hf_dir={hf_dir}", f"data.train=[{rows}]", f"data.eval=[{rows}]", "data.max_pixels=0"]
    masks = ["sft.mask_loss_coeff=1", "sft.mask_head_dim=16"]
    return inputs.train(out_dir, *common, *masks, "optimizer.lr_decay_style=constant", *words)


def _evaluations(out_dir: Path) -> list[dict[str, Any]]:
    return [row for row in log_rows(out_dir) if row["kind"] == "eval"]


def _refused(workers: PoolKeeper, words: list[str], *parts: str) -> None:
    code, _, err = workers(1).run(call, words=words)[0]
    assert code == 2
    the_error(err, *parts, only=False)


def test_masks_are_learned_resumed_exported_and_read_back(
    inputs: Inputs, rows: Path, grown: Path, workers: PoolKeeper, tmp_path: Path
) -> None:
    words = ["optimizer.lr=3e-3", "checkpoint.save_steps=3"]
    whole = tmp_path / "whole"
    succeed(workers, 2, _train(inputs, grown, whole, rows, *words, *PP2, "train.train_iters=8"))
    trained = [row["extra"] for row in log_rows(whole) if row["kind"] == "train"]
    held_out = _evaluations(whole)
    assert set(trained[0]) >= FIGURES and set(held_out[0]) >= FIGURES and held_out[0]["mask/count"] == 12
    assert held_out[-1]["mask/bce"] < held_out[0]["mask/bce"] and 0 < held_out[-1]["mask/iou"] < 1

    parts = tmp_path / "parts"
    succeed(workers, 2, _train(inputs, grown, parts, rows, *words, *TP2, "train.train_iters=3"))
    succeed(workers, 2, _train(inputs, grown, parts, rows, *words, *CP2, "train.train_iters=8"))
    for step, loss in losses(whole).items():
        assert losses(parts)[step] == pytest.approx(loss, rel=1e-5)
    _refused(
        workers,
        _train(inputs, grown, parts, rows, *words, "train.train_iters=9", "sft.mask_head_dim=8"),
        "sft.mask_loss_coeff (or mask_head_dim)",
        "keep it when resuming",
    )

    native, exported = str(whole / "run" / "checkpoints"), tmp_path / "exported"
    succeed(workers, 1, ["convert", "export", "--checkpoint", native, "--hf-dir", str(grown), "--out", str(exported)])
    assert set(load_file(exported / "mask_head" / "model.safetensors")) == set(NAMES)
    assert json.loads((exported / "config.json").read_text())["mask_head"]["width"] == 16
    _, info = AutoModelForImageTextToText.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values()), info
    out, _ = succeed(workers, 1, ["convert", "diff", native, str(exported)])
    assert out.startswith("equal")

    # What was exported goes on where it was, and is a model with words for who reads no masks.
    again = tmp_path / "again"
    succeed(workers, 1, _train(inputs, exported, again, rows, "train.train_iters=1"))
    assert _evaluations(again)[0]["loss"] == pytest.approx(held_out[-1]["loss"], rel=1e-4)
    assert _evaluations(again)[0]["mask/iou"] == pytest.approx(held_out[-1]["mask/iou"], rel=1e-4)
    plain = _train(inputs, exported, tmp_path / "plain", rows, "sft.mask_loss_coeff=0", "sft.mask_head_dim=256")
    succeed(workers, 1, [*plain, "train.train_iters=1"])
    assert not FIGURES & set(_evaluations(tmp_path / "plain")[0])
    wrong = _train(inputs, exported, tmp_path / "wrong", rows, "sft.mask_head_dim=8")
    _refused(workers, wrong, "sft.mask_head_dim", "16, as")


def test_the_head_learns_beside_adapters(
    inputs: Inputs, rows: Path, grown: Path, workers: PoolKeeper, tmp_path: Path
) -> None:
    succeed(workers, 2, _train(inputs, grown, tmp_path, rows, *LORA, *TP2, "train.train_iters=8"))
    held_out = _evaluations(tmp_path)
    assert held_out[-1]["mask/bce"] < held_out[0]["mask/bce"]
    native, exported = str(tmp_path / "run" / "checkpoints"), tmp_path / "exported"
    convert = ["convert", "export", "--checkpoint", native, "--hf-dir", str(grown), "--out"]
    _refused(workers, [*convert, str(tmp_path / "adapter"), "--adapter-only"], "a model with a head for masks")
    succeed(workers, 1, [*convert, str(exported)])
    succeed(workers, 1, _train(inputs, exported, tmp_path / "again", rows, "train.train_iters=1"))
    again = _evaluations(tmp_path / "again")[0]
    assert again["mask/bce"] == pytest.approx(held_out[-1]["mask/bce"], rel=1e-4)
    head = load_file(exported / "mask_head" / "model.safetensors")
    assert head["mask_head.image.weight"].shape[0] == 16 and all(torch.isfinite(one).all() for one in head.values())


def test_what_cannot_learn_masks_is_refused(
    inputs: Inputs, rows: Path, grown: Path, workers: PoolKeeper, tmp_path: Path
) -> None:
    without = _train(inputs, inputs.model("qwen3_vl"), tmp_path / "a", rows)
    _refused(workers, without, "model.hf_dir", "no token <seg>", "megavlm add-tokens '<seg>'")
    tiles = _train(inputs, inputs.model("internvl"), tmp_path / "b", rows)
    _refused(workers, tiles, "sft.mask_loss_coeff", "images as tiles", "a plain grid over the image")
