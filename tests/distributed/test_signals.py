"""Stopping and going on: by signal, after the end, under real torchrun."""

import signal
import sys
from pathlib import Path

import pytest

from tests.distributed.running import Inputs, call, check_intact, checkpoints, log_rows, losses, started, succeed
from tests.pool import PoolKeeper


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.next_core
def test_sigterm_saves_and_the_run_goes_on(
    inputs: Inputs, workers: PoolKeeper, tmp_path: Path, num_processes: int
) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    workers_of_data = f"data.dataloader_num_workers={num_processes - 1}"
    words = inputs.train(stopped, "train.train_iters=100000", workers_of_data)
    launch = ["--nproc", "2"] if num_processes == 2 else []
    with started([*words, *launch], tmp_path) as run:
        run.wait_for(lambda: len(losses(stopped)) >= 2)
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 0, run.text()
        assert "megavlm:" not in run.text()
    last = max(losses(stopped))
    assert checkpoints(stopped) == ["latest", f"step_{last:08d}"]
    check_intact(stopped / "run" / "checkpoints" / f"step_{last:08d}")
    for folder in (stopped, whole):
        words = inputs.train(folder, f"train.train_iters={last + 3}")
        succeed(workers, num_processes, words)
    assert losses(stopped) == pytest.approx(losses(whole), rel=1e-5)
    assert sorted(losses(whole)) == list(range(1, last + 4))
    events = [row["event"] for row in log_rows(stopped) if row["kind"] == "event"]
    assert events == ["start", "save", "stop", "resume", "save", "end"]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_killed_without_warning_it_goes_on_exactly_with_other_data_ranks(
    inputs: Inputs, workers: PoolKeeper, tmp_path: Path, before: int, after: int
) -> None:
    """SIGKILL to every process, data workers too: samples and losses that follow are those of a run never killed."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    knobs = ["checkpoint.save_steps=2", "checkpoint.keep_last=0", "data.dataloader_num_workers=1"]
    words = inputs.train(killed, "train.train_iters=100000", *knobs)
    with started([*words, *(["--nproc", str(before)] if before > 1 else [])], tmp_path) as run:
        run.wait_for(lambda: max(losses(killed), default=0) >= 3)
        run.kill()
    saved = max(int(name.removeprefix("step_")) for name in checkpoints(killed) if name.startswith("step_"))
    for folder, processes in ((killed, after), (whole, before)):
        succeed(workers, processes, inputs.train(folder, f"train.train_iters={saved + 3}", *knobs))
    [resumed] = [row for row in log_rows(killed) if row.get("event") == "resume"]
    assert resumed["step"] == saved
    assert losses(killed) == pytest.approx(losses(whole), rel=1e-5)
    assert sorted(losses(whole)) == list(range(1, saved + 4))


def test_sigterm_before_training_has_begun(inputs: Inputs, tmp_path: Path) -> None:
    with started([*inputs.train(tmp_path), "--nproc", "2"], tmp_path) as run:
        run.wait_for(lambda: len(run.ranks()) == 2)
        run.process.send_signal(signal.SIGTERM)
        code = run.end()
    # The ranks may just have got as far as to finish a step and save.
    assert code == 0 or "stopped by SIGTERM before training had begun" in run.text(), run.text()


def test_a_finished_run_says_so_and_does_nothing(inputs: Inputs, workers: PoolKeeper, tmp_path: Path) -> None:
    words = inputs.train(tmp_path, "train.train_iters=2", f"data.eval={inputs.rows}", "observe.report=true")
    succeed(workers, 1, words)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    [(code, _, err)] = workers(1).run(call, words=words)
    assert code == 0
    assert "run: nothing to do, 2 of 2 steps are done" in err
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    # With more steps in the recipe there is something to do again.
    [(code, _, _)] = workers(1).run(call, words=[*words, "train.train_iters=3"])
    assert code == 0
    assert sorted(losses(tmp_path)) == [1, 2, 3]


def test_data_workers_change_nothing(inputs: Inputs, workers: PoolKeeper, tmp_path: Path) -> None:
    found = []
    for number in (0, 1):
        folder = tmp_path / str(number)
        words = inputs.train(folder, f"data.dataloader_num_workers={number}", f"data.eval={inputs.rows}")
        succeed(workers, 1, words)
        found.append([row["loss"] for row in log_rows(folder) if row["kind"] in ("train", "eval")])
    assert len(found[0]) == 5
    assert found[0] == found[1]


@pytest.mark.next_core
def test_torchrun_itself(inputs: Inputs, workers: PoolKeeper, tmp_path: Path) -> None:
    joined, alone = tmp_path / "joined", tmp_path / "alone"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no_python"]
    with started(inputs.train(joined, "train.train_iters=2"), tmp_path, prefix=torchrun) as run:
        assert run.end() == 0, run.text()
    assert "DP2" in next(row["layout"] for row in log_rows(joined) if row.get("event") == "start")
    words = inputs.train(alone, "train.train_iters=2")
    succeed(workers, 1, words)
    assert losses(joined) == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.parametrize("distributed", ["true", "false"])
@pytest.mark.next_core
def test_the_learning_rate_of_the_recipe_counts_when_resuming(
    inputs: Inputs, workers: PoolKeeper, tmp_path: Path, distributed: str
) -> None:
    words = inputs.train(tmp_path, f"parallel.use_distributed_optimizer={distributed}")
    succeed(workers, 1, [*words, "train.train_iters=1"])
    succeed(workers, 1, [*words, "train.train_iters=2", "optimizer.lr=3e-4", "optimizer.vit_lr=2e-4"])
    rates = [row["learning_rates"] for row in log_rows(tmp_path) if row["kind"] == "train"]
    assert rates == [
        {"vision": 1e-3, "projector": 1e-3, "language": 1e-3},
        {"vision": 2e-4, "projector": 3e-4, "language": 3e-4},
    ]


def test_other_rows_on_a_resume_are_told(inputs: Inputs, workers: PoolKeeper, tmp_path: Path) -> None:
    succeed(workers, 1, inputs.train(tmp_path, "train.train_iters=2"))
    _, err = succeed(workers, 1, inputs.train(tmp_path, "train.train_iters=3"))
    assert "not those that" not in err
    fewer = inputs.damaged(tmp_path / "fewer", lambda rows, _folder: rows.pop())
    _, err = succeed(workers, 1, inputs.train(tmp_path, "train.train_iters=4", fewer))
    assert "the training rows, or what they become, are not those that" in err
