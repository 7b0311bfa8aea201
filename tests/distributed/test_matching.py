"""Matching of texts with images from the command line: rows to log, checkpoint, export, and what is refused."""

import json
from pathlib import Path

import pytest

from tests.distributed.running import Inputs, call, log_rows, losses, succeed, the_error
from tests.pool import PoolKeeper

PP2 = ["parallel.pipeline_model_parallel_size=2"]
HEADS = {"embedding_head.weight", "logit_scale", "logit_bias", "itm_head.weight", "itm_head.bias"}
ACCURACIES = {"accuracy", "accuracy/match", "accuracy/no_match"}


@pytest.fixture(scope="module")
def captions(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of `inputs` that have an image."""
    path = tmp_path_factory.mktemp("captions") / "captions.jsonl"
    rows = [json.loads(line) for line in inputs.rows.read_text().splitlines()]
    for row in rows:
        row["images"] = [str(inputs.root / image) for image in row["images"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["images"]))
    return path


def _train(inputs: Inputs, out_dir: Path, rows: Path, *words: str, stage: str = "matching") -> list[str]:
    common = [f"data.train=[{rows}]", f"data.eval=[{rows}]", "data.max_pixels=0", f"train.stage={stage}"]
    return inputs.train(out_dir, *common, "contrastive.embedding_dim=16", *words)


def test_matches_are_learned_and_exported(inputs: Inputs, captions: Path, workers: PoolKeeper, tmp_path: Path) -> None:
    hf_dir = str(inputs.model("qwen3_vl"))
    words = [f"model.hf_dir={hf_dir}", "matching.match_prompt=what?", *PP2]
    succeed(workers, 2, _train(inputs, tmp_path, captions, "train.train_iters=8", *words))
    rows = [row for row in log_rows(tmp_path) if row["kind"] == "train"]
    assert set(rows[0]["extra"]) >= ACCURACIES | {"recall_at_1/image_to_text", "loss/matching", "loss/contrastive"}
    held_out = [row for row in log_rows(tmp_path) if row["kind"] == "eval"]
    assert held_out[-1]["loss"] < held_out[0]["loss"] and all(0 <= held_out[-1][name] <= 1 for name in ACCURACIES)
    assert held_out[-1]["loss/matching"] < held_out[0]["loss/matching"]

    native, exported = str(tmp_path / "run" / "checkpoints"), str(tmp_path / "exported")
    succeed(workers, 1, ["convert", "export", "--checkpoint", native, "--hf-dir", hf_dir, "--out", exported])
    config = json.loads(Path(exported, "config.json").read_text())
    known = {"size": 16, "image_prompt": "", "text_prompt": "", "match_prompt": "what?"}
    assert config["embedding_head"] == known
    out, _ = succeed(workers, 1, ["convert", "diff", native, exported])
    assert out.startswith("equal")
    assert _tensors(exported) - _tensors(hf_dir) == HEADS

    # What was exported goes on where it was, also as a model of embeddings alone, whose export matching begins from.
    words = [f"model.hf_dir={exported}", "train.train_iters=1"]
    prompt = "matching.match_prompt=what?"
    succeed(workers, 1, _train(inputs, tmp_path / "again", captions, prompt, *words))
    (first, *_) = (row for row in log_rows(tmp_path / "again") if row["kind"] == "eval")
    assert first["loss"] == pytest.approx(held_out[-1]["loss"], rel=1e-4)
    assert {name: first[name] for name in ACCURACIES} == {name: held_out[-1][name] for name in ACCURACIES}
    embeds = tmp_path / "embeds"
    succeed(workers, 1, _train(inputs, embeds, captions, *words, stage="contrastive"))
    (first, *_) = (row for row in log_rows(embeds) if row["kind"] == "eval")
    assert first["loss"] == pytest.approx(held_out[-1]["loss/contrastive"], rel=1e-4)
    native, alone = str(embeds / "run" / "checkpoints"), str(tmp_path / "alone")
    succeed(workers, 1, ["convert", "export", "--checkpoint", native, "--hf-dir", exported, "--out", alone])
    assert HEADS - _tensors(alone) == {"itm_head.weight", "itm_head.bias"}
    succeed(workers, 1, _train(inputs, tmp_path / "new", captions, f"model.hf_dir={alone}", "train.train_iters=1"))
    (before, *_, after) = (row for row in log_rows(embeds) if row["kind"] == "eval")
    (first, *_) = (row for row in log_rows(tmp_path / "new") if row["kind"] == "eval")
    assert (
        first["loss/contrastive"] == pytest.approx(after["loss"], rel=1e-4) != pytest.approx(before["loss"], rel=1e-4)
    )


def _tensors(folder: str | Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(Path(folder, "model.safetensors"), "pt") as file:
        return set(file.keys())


def test_a_run_goes_on_where_it_was(inputs: Inputs, captions: Path, workers: PoolKeeper, tmp_path: Path) -> None:
    words = ["checkpoint.save_steps=2", *PP2]
    succeed(workers, 2, _train(inputs, tmp_path / "whole", captions, "train.train_iters=4", *words))
    whole = losses(tmp_path / "whole")
    halves = tmp_path / "halves"
    succeed(workers, 2, _train(inputs, halves, captions, "train.train_iters=2", *words))
    succeed(workers, 2, _train(inputs, halves, captions, "train.train_iters=4", *words))
    assert losses(halves) == whole
    for changed, stage, parts in (
        (["matching.match_prompt=else"], "matching", ("matching.match_prompt", "keep it when resuming")),
        ([], "contrastive", ("a checkpoint that ends in matches",)),
    ):
        again = _train(inputs, halves, captions, "train.train_iters=5", *changed, *words, stage=stage)
        code, _, err = workers(2).run(call, words=again)[0]
        assert code == 2
        the_error(err, *parts, only=False)


def test_rows_that_all_say_the_same_are_told_from_nothing(
    inputs: Inputs, captions: Path, workers: PoolKeeper, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in captions.read_text().splitlines()]
    for row in rows:
        row["messages"][-1]["content"] = "a red square"
    file = tmp_path / "captions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = workers(1).run(call, words=_train(inputs, tmp_path, file))[0]
    assert code == 1
    the_error(err, "none is told from another", only=False)
