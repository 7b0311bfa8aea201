"""Iterative fine-tuning from the command line: rounds, what they keep, and going on."""

import contextlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from megavlm.cli.main import main
from tests.distributed.running import Inputs, call, succeed, the_error
from tests.distributed.test_preferences import our_scores
from tests.pool import PoolKeeper

NUM_GENERATIONS = 6


@pytest.fixture(scope="module")
def rows(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The questions of `inputs`, half of them to be answered `red`, the others `blue`."""
    path = tmp_path_factory.mktemp("iterate") / "rows.jsonl"
    lines = [json.loads(line) for line in inputs.rows.read_text().splitlines()]
    for number, row in enumerate(lines):
        row["images"] = [str(inputs.root / image) for image in row["images"]]
        row["messages"][-1]["content"] = "red" if number % 2 else "blue"
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return path


@pytest.fixture(scope="module")
def start_dir(inputs: Inputs, rows: Path, workers: PoolKeeper) -> Path:
    """A model that has seen such answers, and does not know yet which is right."""
    out_dir = rows.parent / "start"
    words = [f"data.train=[{rows}]", "train.train_iters=16", "optimizer.lr=2e-3"]
    succeed(workers, 1, inputs.train(out_dir, *words))
    words = ["convert", "export", "--checkpoint", str(out_dir / "run" / "checkpoints")]
    exported = rows.parent / "exported"
    succeed(workers, 1, [*words, "--hf-dir", str(inputs.model("qwen3_vl")), "--out", str(exported)])
    return exported


def _words(inputs: Inputs, rows: Path, hf_dir: Path, out_dir: Path, *words: str) -> list[str]:
    knobs = [f"data.train=[{rows}]", f"model.hf_dir={hf_dir}", f"iterate.num_generations={NUM_GENERATIONS}"]
    knobs += ["iterate.max_completion_length=8", "train.train_iters=4", "optimizer.lr=2e-3", *words]
    return ["iterate", inputs.recipe, f"output_dir={out_dir}", *knobs]


def _run(words: list[str], workers: PoolKeeper) -> list[dict[str, Any]]:
    """The loop, its phases in the pool's workers; the summaries of its rounds, as it prints them."""
    out = io.StringIO()
    with patch("megavlm.cli.launch.launch", lambda number, phase: _in_workers(workers, number, phase)):
        with contextlib.redirect_stdout(out):
            assert main(words) == 0
    return [json.loads(line) for line in out.getvalue().splitlines() if line.startswith("{")]


def _in_workers(workers: PoolKeeper, num_processes: int, words: Sequence[str]) -> int:
    succeed(workers, num_processes, words)
    return 0


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rounds_learn_the_right_answers_and_go_on_where_they_were(
    inputs: Inputs, rows: Path, start_dir: Path, workers: PoolKeeper, tmp_path: Path
) -> None:
    two = ["parallel.pipeline_model_parallel_size=2", "--nproc", "2"]
    words = _words(inputs, rows, start_dir, tmp_path, *two)
    (first,) = _run([*words, "iterate.num_rounds=1"], workers)
    folder = tmp_path / "run" / "round_1"
    truths = [row["messages"][-1]["content"] for row in _lines(rows)]
    answers, scored, kept = (_lines(folder / name) for name in ("answers.jsonl", "scored.jsonl", "kept.jsonl"))
    assert [row["row"] for row in answers] == list(range(len(truths)))
    assert all(len(row["answers"]) == NUM_GENERATIONS for row in answers)
    assert len({text for row in answers for text in row["answers"]}) > 2, "answers are drawn"
    for row, truth in zip(scored, truths, strict=True):
        assert row["rewards"] == [None if text is None else float(text == truth) for text in row["answers"]]
    right = [index for index, row in enumerate(scored) if 1.0 in row["rewards"]]
    assert 0 < len(right) == len(kept) == first["kept"] < len(truths)
    for index, row in zip(right, kept, strict=True):
        assert row["messages"][-1]["content"] == truths[index] and row["reward"] == 1.0
    assert first["answers"] == len(truths) * NUM_GENERATIONS
    assert first["unfinished"] == sum(text is None for row in answers for text in row["answers"])
    assert (folder / "train" / "metrics.jsonl").is_file() and (folder / "exported" / "config.json").is_file()

    # A second call for more rounds does nothing of the first again; a lost phase is done again, and only that.
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.jsonl")}
    both = _run([*words, "iterate.num_rounds=2"], workers)
    assert both[0] == first and both[1]["round"] == 2
    assert both[1]["mean_reward"] > first["mean_reward"]
    shutil.rmtree(tmp_path / "run" / "round_2" / "exported")
    second = tmp_path / "run" / "round_2" / "kept.jsonl"
    written = second.stat().st_mtime_ns
    assert _run([*words, "iterate.num_rounds=2"], workers) == both
    assert second.stat().st_mtime_ns == written and (tmp_path / "run" / "round_2" / "exported").is_dir()
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.jsonl")} == before


def test_processes_that_are_started_do_the_same(
    inputs: Inputs, rows: Path, start_dir: Path, workers: PoolKeeper, tmp_path: Path
) -> None:
    """Not in the pool: `sample` and `train` start processes of their own, as for a user."""
    shared = ["parallel.pipeline_model_parallel_size=2", "--nproc", "2", "iterate.num_rounds=1"]
    summaries = _run(_words(inputs, rows, start_dir, tmp_path / "pool", *shared), workers)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(_words(inputs, rows, start_dir, tmp_path / "started", *shared)) == 0
    assert [json.loads(line) for line in out.getvalue().splitlines() if line.startswith("{")] == summaries
    kept = [_lines(tmp_path / where / "run" / "round_1" / "kept.jsonl") for where in ("pool", "started")]
    assert kept[0] == kept[1]
    exported = [tmp_path / where / "run" / "round_1" / "exported" for where in ("pool", "started")]
    weights = [load_file(folder / "model.safetensors") for folder in exported]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_reward_model_scores_answers_of_another_engine(
    inputs: Inputs, rows: Path, workers: PoolKeeper, tmp_path: Path
) -> None:
    judge = tmp_path / "judge"
    shutil.copytree(inputs.model("qwen3_vl"), judge)
    weights = load_file(judge / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    weights["score.weight"] = torch.randn(1, 64, generator=generator)
    save_file(weights, judge / "model.safetensors", metadata={"format": "pt"})
    folder = tmp_path / "run" / "round_1"
    folder.mkdir(parents=True)
    given = [["red", "blue", None], ["lazy dog", "red", "red"]]
    (folder / "answers.jsonl").write_text(
        "".join(json.dumps({"row": row, "answers": texts}) + "\n" for row, texts in enumerate(given))
    )
    words = _words(inputs, rows, inputs.model("qwen3_vl"), tmp_path, f"iterate.reward_model={judge}")
    words += ["iterate.reward=reward_model", "iterate.threshold=-1000", "--round", "1", "--phase", "score"]
    succeed(workers, 1, words)
    scored, kept = _lines(folder / "scored.jsonl"), _lines(folder / "kept.jsonl")
    for texts, row, best in zip(given, scored, kept, strict=True):
        assert [reward is None for reward in row["rewards"]] == [text is None for text in texts]
        top = max(reward for reward in row["rewards"] if reward is not None)
        assert best["messages"][-1]["content"] == texts[row["rewards"].index(top)] and best["reward"] == top
    # kept.jsonl is rows again: what the reward model says of them is what it said
    (again,) = workers(1).run(our_scores, hf_dir=str(judge), rows=str(folder / "kept.jsonl"), max_pixels=4096)
    assert [score for _tokens, score in again] == pytest.approx([row["reward"] for row in kept], rel=0, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--phase", "train"], ("--round", "1 to 3")),
        (["--round", "1", "--phase", "train"], ("--phase", "score of round 1 first")),
        (["--round", "2", "--phase", "sample"], ("--phase", "export of round 1 first")),
        (["train.stage=dpo"], ("train.stage", "sft with `megavlm iterate`")),
    ],
)
def test_mistakes_are_one_line(
    inputs: Inputs, rows: Path, workers: PoolKeeper, tmp_path: Path, words: list[str], parts: tuple[str, ...]
) -> None:
    asked = _words(inputs, rows, inputs.model("qwen3_vl"), tmp_path, *words)
    code, _, err = workers(1).run(call, words=asked)[0]
    assert code == 2
    the_error(err, *parts)
