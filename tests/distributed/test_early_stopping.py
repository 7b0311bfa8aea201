"""A run whose held-out loss does not fall ends before its last step, also after a resume in between."""

from pathlib import Path

from tests.distributed.running import Inputs, call, log_rows, losses, succeed, the_error
from tests.pool import PoolKeeper


def _words(inputs: Inputs, out_dir: Path, *words: str) -> list[str]:
    # No loss falls that far: every evaluation after the first counts as no better.
    common = [f"data.eval=[{inputs.rows}]", "train.eval_steps=1", "train.early_stopping_patience=3"]
    return inputs.train(out_dir, *common, "train.train_iters=9", "train.early_stopping_threshold=1000", *words)


def test_a_run_ends_early_and_stays_ended(inputs: Inputs, workers: PoolKeeper, tmp_path: Path) -> None:
    words = _words(inputs, tmp_path, "parallel.pipeline_model_parallel_size=2")
    succeed(workers, 2, words)
    assert sorted(losses(tmp_path)) == [1, 2, 3]
    (end,) = [row for row in log_rows(tmp_path) if row.get("event") == "end"]
    assert end["text"] == "3 steps: the loss on held-out rows does not fall any more"
    assert (tmp_path / "run" / "checkpoints" / "step_00000003").is_dir()
    before = log_rows(tmp_path)
    succeed(workers, 2, words)
    assert log_rows(tmp_path) == before


def test_evaluations_before_a_resume_count(inputs: Inputs, workers: PoolKeeper, tmp_path: Path) -> None:
    words = _words(inputs, tmp_path, "optimizer.lr_decay_style=constant")
    succeed(workers, 1, [*words, "train.train_iters=2"])
    succeed(workers, 1, words)
    assert sorted(losses(tmp_path)) == [1, 2, 3]


def test_it_needs_evaluations(inputs: Inputs, workers: PoolKeeper, tmp_path: Path) -> None:
    code, _, err = workers(1).run(call, words=_words(inputs, tmp_path, "train.eval_steps=0"))[0]
    assert code == 2
    the_error(err, "train.early_stopping_patience", "without train.eval_steps")
