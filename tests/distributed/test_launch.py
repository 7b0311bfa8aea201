"""Runs that `megavlm launch` starts: two nodes (of one machine) under torchrun, and SLURM, played by stand-ins."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.distributed.running import REPO_DIR, Inputs, Started, check_intact, checkpoints, log_rows, losses, succeed
from tests.pool import PoolKeeper
from tests.slurm_stand_in import SCRIPTS, put_commands

VENV = Path(sys.prefix)
ENDLESS = 100_000


def write_recipe(inputs: Inputs, folder: Path, num_steps: int) -> str:
    """The recipe with a number of steps and a run folder below `folder`; it may be written again between two starts."""
    recipe = yaml.safe_load(Path(inputs.recipe).read_text())
    recipe["output_dir"] = str(folder)
    recipe["train"]["train_iters"] = num_steps
    recipe["checkpoint"] = {"save_steps": 2}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def nodes(command: list[str], folder: Path, **environment: str) -> list[Started]:
    """Start a command as two nodes would: each with its NODE_RANK."""
    return [start_node(command, folder, rank, **environment) for rank in (0, 1)]


def start_node(command: list[str], folder: Path, rank: int, **environment: str) -> Started:
    path = f"{VENV}/bin:{os.environ['PATH']}"
    err_file = folder / f"node_{rank}_{len(list(folder.glob('*.err')))}.err"
    return Started(command, err_file, PATH=path, NODE_RANK=str(rank), **environment)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def write_script(folder: Path, *words: str) -> str:
    command = [sys.executable, "-m", "megavlm", "launch", *words, "--write", str(folder)]
    done = subprocess.run(command, cwd=REPO_DIR, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def check_as_whole(inputs: Inputs, workers: PoolKeeper, folder: Path, num_steps: int) -> None:
    """Its losses are those of a run of two processes on one node that nothing has happened to."""
    whole = folder / "whole"
    succeed(workers, 2, inputs.train(whole, f"train.train_iters={num_steps}"))
    assert sorted(losses(whole)) == list(range(1, num_steps + 1))
    assert losses(folder) == pytest.approx(losses(whole), rel=1e-5)


def test_two_nodes_train_as_one(inputs: Inputs, workers: PoolKeeper, tmp_path: Path) -> None:
    recipe = write_recipe(inputs, tmp_path, 3)
    command = [str(REPO_DIR / "examples" / "torchrun.sh"), recipe]
    meeting = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = nodes(command, tmp_path, **meeting)
    try:
        for node in started:
            assert node.end() == 0, node.text()
    finally:
        for node in started:
            node.kill()
    assert "DP2" in next(row["layout"] for row in log_rows(tmp_path) if row.get("event") == "start")
    check_as_whole(inputs, workers, tmp_path, 3)


def test_a_lost_node_comes_back_and_the_run_goes_on(inputs: Inputs, workers: PoolKeeper, tmp_path: Path) -> None:
    recipe = write_recipe(inputs, tmp_path, ENDLESS)
    options = ["--nodes", "2", "--master-addr", "127.0.0.1", "--master-port", free_port()]
    command = ["bash", write_script(tmp_path, "torchrun", recipe, *options)]
    # A node counts as lost after three missed signs of life; by default they are 5 s apart.
    started = nodes(command, tmp_path, RDZV_CONF="keep_alive_interval=1")
    try:
        started[0].wait_for(lambda: max(losses(tmp_path), default=0) >= 3)
        started[1].kill()
        saved = max(int(name.removeprefix("step_")) for name in checkpoints(tmp_path) if name.startswith("step_"))
        num_steps = saved + 5  # a checkpoint that was all but complete may still appear
        write_recipe(inputs, tmp_path, num_steps)
        started.append(start_node(command, tmp_path, 1, RDZV_CONF="keep_alive_interval=1"))
        for node in (started[0], started[2]):
            assert node.end() == 0, node.text()
    finally:
        for node in started:
            node.kill()
    [resumed] = [row for row in log_rows(tmp_path) if row.get("event") == "resume"]
    assert resumed["step"] in (saved, saved + 2)
    check_as_whole(inputs, workers, tmp_path, num_steps)


def test_slurm_saves_before_the_time_limit_and_goes_on(inputs: Inputs, workers: PoolKeeper, tmp_path: Path) -> None:
    recipe = write_recipe(inputs, tmp_path, ENDLESS)
    words = ["slurm", recipe, "--nodes", "2", "--venv", str(VENV), "--cpus-per-task", "1"]
    command = [sys.executable, "-m", "megavlm", "launch", *words, "--log-dir", str(tmp_path / "logs")]
    queue = tmp_path / "slurm"
    environment = put_commands(queue, SCRIPTS)
    (queue / "hold").touch()
    job = Started(command, tmp_path / "sbatch.err", **environment)
    try:
        job.wait_for(lambda: len(losses(tmp_path)) >= 2)
        os.kill(int((queue / "batch_pid").read_text()), signal.SIGUSR1)  # as --signal=B:USR1@... has it
        job.wait_for((queue / "pending").exists)
        last = max(losses(tmp_path))
        assert f"step_{last:08d}" in checkpoints(tmp_path)
        check_intact(tmp_path / "run" / "checkpoints" / f"step_{last:08d}")
        write_recipe(inputs, tmp_path, last + 3)
        (queue / "hold").unlink()
        assert job.end() == 0, job.text() + (queue / "batch.log").read_text()
    finally:
        job.kill()
    check_as_whole(inputs, workers, tmp_path, last + 3)
    events = [row["event"] for row in log_rows(tmp_path) if row["kind"] == "event" and row["event"] != "save"]
    assert events == ["start", "stop", "resume", "end"]
    assert not (queue / "requeued").exists(), "a run that has ended is not queued again"
    for node in (0, 1):
        assert (tmp_path / "logs" / "4242" / f"node_{node}.log").is_file()
