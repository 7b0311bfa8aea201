"""Embeddings of images and texts from the command line: rows to log, checkpoint, export, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.evaluate.transformers_generate import load_checked
from tests.distributed.running import Inputs, call, log_rows, losses, succeed, the_error
from tests.pool import PoolKeeper

PP2 = ["parallel.pipeline_model_parallel_size=2"]
RECALLS = {"recall_at_1/image_to_text", "recall_at_1/text_to_image"}
HEAD = {"embedding_head.weight", "logit_scale", "logit_bias"}


@pytest.fixture(scope="module")
def captions(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of `inputs` that have an image."""
    path = tmp_path_factory.mktemp("captions") / "captions.jsonl"
    rows = [json.loads(line) for line in inputs.rows.read_text().splitlines()]
    for row in rows:
        row["images"] = [str(inputs.root / image) for image in row["images"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["images"]))
    return path


def _train(inputs: Inputs, out_dir: Path, rows: Path, *words: str) -> list[str]:
    common = [f"data.train=[{rows}]", f"data.eval=[{rows}]", "data.max_pixels=0", "train.stage=contrastive"]
    return inputs.train(out_dir, *common, "contrastive.embedding_dim=16", *words)


def _evaluations(out_dir: Path) -> list[dict[str, Any]]:
    return [row for row in log_rows(out_dir) if row["kind"] == "eval"]


@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_an_embedding_model_is_trained_and_exported(
    inputs: Inputs, captions: Path, workers: PoolKeeper, tmp_path: Path, family: str
) -> None:
    hf_dir = str(inputs.model(family))
    words = [f"model.hf_dir={hf_dir}", "contrastive.text_prompt=what?", *PP2]
    succeed(workers, 2, _train(inputs, tmp_path, captions, "train.train_iters=8", *words))
    rows = [row for row in log_rows(tmp_path) if row["kind"] == "train"]
    assert set(rows[0]["extra"]) >= RECALLS | {"logit_scale"} and rows[0]["num_tokens"] == 4
    held_out = _evaluations(tmp_path)
    assert held_out[-1]["loss"] < held_out[0]["loss"] and held_out[-1]["num_tokens"] == 6
    assert all(held_out[-1][name] > held_out[0][name] for name in RECALLS)
    assert held_out[-1]["logit_scale"] != pytest.approx(1 / 0.07, rel=1e-4)

    native, exported = str(tmp_path / "run" / "checkpoints"), str(tmp_path / "exported")
    succeed(workers, 1, ["convert", "export", "--checkpoint", native, "--hf-dir", hf_dir, "--out", exported])
    config = json.loads(Path(exported, "config.json").read_text())
    assert config["embedding_head"] == {"size": 16, "image_prompt": "", "text_prompt": "what?"}
    out, _ = succeed(workers, 1, ["convert", "diff", native, exported])
    assert out.startswith("equal")
    _check_tensors(hf_dir, exported)

    # What was exported is an embedding model again, and a model with words for any other stage.
    again = tmp_path / "again"
    words = [f"model.hf_dir={exported}", "contrastive.text_prompt=what?", "train.train_iters=1"]
    succeed(workers, 1, _train(inputs, again, captions, *words))
    assert _evaluations(again)[0]["loss"] == pytest.approx(held_out[-1]["loss"], rel=1e-4)
    succeed(workers, 1, inputs.train(tmp_path / "sft", f"model.hf_dir={exported}", "train.train_iters=1"))
    native, plain = str(tmp_path / "sft" / "run" / "checkpoints"), str(tmp_path / "plain")
    succeed(workers, 1, ["convert", "export", "--checkpoint", native, "--hf-dir", exported, "--out", plain])
    assert "embedding_head" not in json.loads(Path(plain, "config.json").read_text())
    load_checked(exported), load_checked(plain)  # nothing is missing, nothing left over but the head
    wrong = _train(inputs, tmp_path / "wrong", captions, *words, "contrastive.embedding_dim=8")
    code, _, err = workers(1).run(call, words=wrong)[0]
    assert code == 2
    the_error(err, "contrastive.embedding_dim", "16, as", only=False)


def _check_tensors(hf_dir: str, exported: str) -> None:
    """transformers reads all but the head, and an untied output layer is what it was."""
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText

    before, after = (load_file(Path(folder, "model.safetensors")) for folder in (hf_dir, exported))
    words = [[one for name, one in tensors.items() if name.endswith("lm_head.weight")] for tensors in (before, after)]
    assert len(words[0]) == len(words[1]) and all(map(torch.equal, *words))
    _, info = AutoModelForImageTextToText.from_pretrained(exported, output_loading_info=True)
    assert not info["missing_keys"] and set(info["unexpected_keys"]) == HEAD


def test_a_run_goes_on_where_it_was(inputs: Inputs, captions: Path, workers: PoolKeeper, tmp_path: Path) -> None:
    words = ["contrastive.loss_type=sigmoid", "checkpoint.save_steps=2", "optimizer.freeze_llm=true", *PP2]
    succeed(workers, 2, _train(inputs, tmp_path / "whole", captions, "train.train_iters=4", *words))
    whole = losses(tmp_path / "whole")
    assert whole[4] < whole[1]
    first, *_, last = (row["extra"] for row in log_rows(tmp_path / "whole") if row["kind"] == "train")
    halves = tmp_path / "halves"
    succeed(workers, 2, _train(inputs, halves, captions, "train.train_iters=2", *words))
    succeed(workers, 2, _train(inputs, halves, captions, "train.train_iters=4", *words))
    assert losses(halves) == whole
    scales = [row["extra"]["logit_scale"] for row in log_rows(halves) if row["kind"] == "train"]
    assert len(set(scales)) == 4 and first["logit_bias"] != last["logit_bias"]
    changed = _train(inputs, halves, captions, "train.train_iters=5", "contrastive.text_prompt=else", *words)
    code, _, err = workers(2).run(call, words=changed)[0]
    assert code == 2
    the_error(err, "contrastive.text_prompt", "keep it when resuming", only=False)


def scale_at_its_limit(words: list[str]) -> dict[str, Any]:
    """In a worker: the scale of logits, and the optimizer's own, pushed over the limit and updated behind it."""
    from megavlm.config.load import load_recipe
    from megavlm.models.embedding_head import SCALE_NAME
    from megavlm.models.names import named_parameters
    from megavlm.train.state import build_state
    from megavlm.train.step import train_step

    state = build_state(load_recipe(words[1], words[2:]))
    (scale,) = (one for model in state.models for name, one in named_parameters(model) if name == SCALE_NAME)
    main = vars(scale).get("main_param")
    with torch.no_grad():
        for tensor in (scale, main):
            if tensor is not None:
                tensor.fill_(6.0)
    result = train_step(state, 0)
    after = [float(tensor) for tensor in (scale, main) if tensor is not None]
    return {"used": result.figures["logit_scale"], "after": after}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_are_scaled_by_100_at_most(
    inputs: Inputs, captions: Path, workers: PoolKeeper, tmp_path: Path, precision: str
) -> None:
    words = _train(inputs, tmp_path, captions, f"train.precision={precision}", "optimizer.lr=1e-6")
    found = workers(2).run(scale_at_its_limit, words=words)
    assert all(one["used"] > 400 for one in found), "it was pushed over the limit"
    limits = [value for one in found for value in one["after"]]
    assert len(limits) == (2 if precision == "fp32" else 3), "one rank has the optimizer's own"
    assert all(4.55 < value <= 4.6052 for value in limits), limits


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a"}], "images": []},
            ("captions.jsonl:2", "no image"),
        ),
        ({"weight": 2.0}, ("captions.jsonl:2", "weight")),
    ],
)
def test_rows_that_do_not_fit_end_the_run(
    inputs: Inputs, captions: Path, workers: PoolKeeper, tmp_path: Path, change: dict[str, Any], parts: tuple[str, ...]
) -> None:
    rows = [json.loads(line) for line in captions.read_text().splitlines()]
    rows[1] |= change
    file = tmp_path / "captions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = workers(1).run(call, words=_train(inputs, tmp_path, file))[0]
    assert code == 2
    the_error(err, *parts, only=False)


def test_one_held_out_row_is_told_from_nothing(
    inputs: Inputs, captions: Path, workers: PoolKeeper, tmp_path: Path
) -> None:
    (tmp_path / "one.jsonl").write_text(captions.read_text().splitlines()[0] + "\n")
    words = [*_train(inputs, tmp_path, captions), f"data.eval=[{tmp_path}/one.jsonl]"]
    code, _, err = workers(1).run(call, words=words)[0]
    assert code == 1
    the_error(err, "one row alone", only=False)
