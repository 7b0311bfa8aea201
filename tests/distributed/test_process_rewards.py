"""Process reward models from the command line: rows in steps to log, export, and the scores of steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.data.rows import Rows
from tests.distributed.running import Inputs, call, log_rows, succeed, the_error
from tests.distributed.test_preferences import train_words, transformers_scores
from tests.pool import PoolKeeper


@pytest.fixture(scope="module")
def steps(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The questions of `inputs`, answered in steps; those that begin with `lazy` are wrong."""
    path = tmp_path_factory.mktemp("steps") / "steps.jsonl"
    lines = []
    for number, line in enumerate(inputs.rows.read_text().splitlines()):
        row = json.loads(line)
        labels = [(number + step) % 3 > 0 for step in range(1 + number % 4)]
        lines.append(
            {
                "prompt": row["messages"][:1],
                "images": [str(inputs.root / image) for image in row["images"]],
                "completions": ["a red square" if label else "lazy dog over there" for label in labels],
                "labels": labels,
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return path


def our_step_scores(hf_dir: str, rows: str) -> list[tuple[list[int], list[int], list[float]]]:
    """In a worker: tokens of rows in one packed row, where their steps end, and what a directory's model says there."""
    from megavlm.checkpoint.hf_io import HFDirectory
    from megavlm.checkpoint.hf_load import load_weights
    from megavlm.data.encode import open_encoder
    from megavlm.data.packing import pack
    from megavlm.data.pixels import load_sample_patches
    from megavlm.train.single import build_single
    from megavlm.train.stages.prm import step_marks

    directory = HFDirectory(hf_dir)
    encoder = open_encoder(hf_dir, directory.architecture.inputs, 512, row_kind="steps")
    model = build_single(directory, "fp32")
    load_weights(directory, model.parts)
    encoded = [encoder.encode(sample) for sample in list(Rows.open([rows]))[:5]]
    patches = [patch for row in encoded for patch in load_sample_patches(row, encoder)]
    sizes: dict[str, Any] = {"sample_multiple": 1, "total_multiple": 1, "pad_token_id": 0}
    batch = pack(encoded, patches, patch_channels=directory.architecture.inputs.patch_channels, **sizes)
    with torch.no_grad():
        scores_T = model.logits(batch, torch.device("cpu"))[:, 0]
    found, start = [], 0
    for row in encoded:
        part = slice(start, start + len(row.tokens_S))
        ends = torch.nonzero(step_marks(batch)[part])[:, 0]
        found.append((row.tokens_S.tolist(), ends.tolist(), scores_T[part][ends].tolist()))
        start = part.stop
    return found


@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_a_process_reward_model_is_trained_and_exported(
    inputs: Inputs, steps: Path, workers: PoolKeeper, tmp_path: Path, family: str
) -> None:
    hf_dir = str(inputs.model(family))
    words = [f"model.hf_dir={hf_dir}", "optimizer.lr=3e-3", "parallel.pipeline_model_parallel_size=2"]
    succeed(workers, 2, train_words(inputs, tmp_path, steps, "prm", "train.train_iters=16", *words))
    rows = [json.loads(line) for line in steps.read_text().splitlines()]
    labels = [label for row in rows for label in row["labels"]]
    held_out = [row for row in log_rows(tmp_path) if row["kind"] == "eval"]
    assert held_out[0]["num_tokens"] == len(labels)
    assert held_out[-1]["loss"] < held_out[0]["loss"] / 2
    assert held_out[-1]["accuracy"] > 0.9 > held_out[0]["accuracy"]
    last = held_out[-1]
    share = sum(labels) / len(labels)
    mean = share * last["accuracy/right"] + (1 - share) * last["accuracy/wrong"]
    assert last["accuracy"] == pytest.approx(mean, rel=1e-6)

    exported = str(tmp_path / "exported")
    words = ["convert", "export", "--checkpoint", str(tmp_path / "run" / "checkpoints"), "--hf-dir", hf_dir]
    succeed(workers, 1, [*words, "--out", exported])
    config = json.loads(Path(exported, "config.json").read_text())
    assert config["num_labels"] == 1
    assert all(name.endswith("ForTokenClassification") for name in config["architectures"])
    (found,) = workers(1).run(our_step_scores, hf_dir=exported, rows=str(steps))
    for row, sample, (tokens, ends, scores) in zip(rows, Rows.open([str(steps)]), found, strict=False):
        assert len(ends) == len(row["labels"])
        theirs = transformers_scores(exported, sample, tokens)[ends].tolist()
        assert theirs == pytest.approx(scores, rel=0, abs=1e-5)


def test_rows_without_steps_end_the_run(inputs: Inputs, workers: PoolKeeper, tmp_path: Path) -> None:
    code, _, err = workers(1).run(call, words=inputs.train(tmp_path, "train.stage=prm"))[0]
    assert code == 2
    the_error(err, "rows.jsonl:1", "no steps", "completions", only=False)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("reward.score_at=end_of_answer", ("reward.score_at", "train.stage=rm")),
        ("reward.step_separator=", ("reward.step_separator", "a text behind each step")),
        ("data.too_long=cut_turns", ("data.too_long", "judged")),
        ("optimizer.freeze_llm=true", ("optimizer.freeze_llm", "train.stage prm")),
    ],
)
def test_contradictions_are_one_line(
    inputs: Inputs, steps: Path, workers: PoolKeeper, tmp_path: Path, override: str, parts: tuple[str, ...]
) -> None:
    code, _, err = workers(1).run(call, words=train_words(inputs, tmp_path, steps, "prm", override))[0]
    assert code == 2
    the_error(err, *parts)
