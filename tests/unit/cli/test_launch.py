"""Scripts that start runs: what is refused, what is written, and that every word arrives where it should."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megavlm.cli.main import main
from tests.slurm_stand_in import SCRIPTS, put_commands

REPO_DIR = Path(__file__).resolve().parents[3]
BIN_DIR = Path(sys.executable).parent
RECIPE = "examples/recipes/qwen3_vl_8b.yaml"  # TP2 x PP4
EXAMPLES = sorted((REPO_DIR / "examples" / "slurm").glob("*.sbatch"))
AWKWARD = "data.image_dir=a folder/with 'quotes' $HOME \"and\" more"
SLURM = ["--nodes", "2", "--nproc-per-node", "4", "--cpus-per-task", "3"]
# One line for each word that a command gets.
RECORD = '#!/usr/bin/env bash\nprintf \'%s\\n\' "$@" >>"$STAND_IN/words"\n'


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO_DIR)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def launch(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["launch", *words]) == 0
    return capsys.readouterr().out


def bash(script: str, folder: Path, **environment: str) -> None:
    done = subprocess.run(
        ["bash", "-c", script], env=os.environ | environment, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_what_the_command_in_them_writes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = path.read_text()
    [line] = [line for line in text.splitlines() if line.startswith("# Written by: megavlm ")]
    words = shlex.split(line.removeprefix("# Written by: megavlm "))
    assert main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out == text


def test_there_is_an_example_with_a_container_and_one_without() -> None:
    assert sorted(path.name for path in EXAMPLES) == ["sft_bare.sbatch", "sft_container.sbatch"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["slurm", RECIPE, "--nproc-per-node", "7", "--venv", "v"], ["world size", "7 processes", "multiple of 8"]),
        (["torchrun", RECIPE, "--nproc-per-node", "4"], ["world size", "4 processes"]),
        (["torchrun", RECIPE, "--nodes", "2", "--nproc-per-node", "4"], ["--master-addr", "got nothing"]),
        (["slurm", RECIPE, *SLURM], ["--container-image, --venv", "got neither"]),
        (["slurm", RECIPE, *SLURM, "--venv", "v", "--container-image", "i"], ["got both"]),
        (["slurm", RECIPE, *SLURM, "--venv", "v", "--container-mounts", "/a:/a"], ["--container-mounts"]),
        (["slurm", RECIPE, *SLURM, "--venv", "v", "--time", "90"], ["--time", "`90`", "HH:MM:SS"]),
        (["slurm", RECIPE, *SLURM, "--venv", "v", "--save-before-limit-s", "5"], ["at least 60"]),
        (["torchrun", RECIPE, "--nproc-per-node", "8", "--partition", "p"], ["--partition", "slurm only"]),
        (["local", RECIPE, "--nproc-per-node", "8", "--socket-ifname", "ib0"], ["torchrun or slurm only"]),
        (["local", RECIPE, "--nodes", "2", "--nproc-per-node", "4"], ["--nodes", "1 with local"]),
        (["local", RECIPE, "--nproc-per-node", "0"], ["--nproc-per-node", "at least 1"]),
        (["local", RECIPE, "--nproc-per-node", "8"], ["model.hf_dir", "does not exist"]),
        (["slurm", RECIPE, *SLURM, "--venv", "v", "train.lr=1"], ["train.lr"]),
        (["slurm", RECIPE, *SLURM, "--venv", "v", "name=a b"], ["name", "`a b`"]),
        (["pbs", RECIPE], ["invalid choice: 'pbs'"]),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(
    words: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", *words, "--write", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    for part in parts:
        assert part in captured.err
    assert not (tmp_path / "out").exists()


def test_scripts_are_written_with_the_recipes_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slurm, torchrun = ["slurm", RECIPE, *SLURM, "--venv", "v"], ["torchrun", RECIPE, "--nproc-per-node", "8"]
    for words, name in ((slurm, "qwen3_vl_8b.sbatch"), (torchrun, "qwen3_vl_8b.torchrun.sh")):
        printed = launch(capsys, *words, "--dry-run")
        assert launch(capsys, *words, "--write", str(tmp_path / "out")) == f"{tmp_path}/out/{name}\n"
        assert (tmp_path / "out" / name).read_text() == printed
        assert os.access(tmp_path / "out" / name, os.X_OK)


def test_local_is_train_with_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[argparse.Namespace] = []

    def train(args: argparse.Namespace) -> int:
        trained.append(args)
        return 5

    monkeypatch.setattr("megavlm.cli.train.run", train)
    (tmp_path / "rows.jsonl").touch()
    paths = [f"model.hf_dir={tmp_path}", f"data.train=[{tmp_path}/rows.jsonl]", f"data.eval=[{tmp_path}/rows.jsonl]"]
    words = ["local", RECIPE, *paths, "--nproc-per-node", "8"]
    assert main(["launch", *words]) == 5
    [args] = trained
    assert (args.recipe, args.overrides, args.nproc, args.dry_run) == (RECIPE, paths, 8, False)
    script = launch(capsys, *words, "--dry-run")
    bash(script, tmp_path, **put_commands(tmp_path, {"megavlm": RECORD}))
    assert (tmp_path / "words").read_text().splitlines() == ["train", RECIPE, *paths, "--nproc", "8"]


def test_example_and_written_script_give_torchrun_the_same_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [RECIPE, "--nodes", "2", "--nproc-per-node", "4", "--master-addr", "host-0", "--master-port", "1234"]
    written = launch(capsys, "torchrun", *words, AWKWARD, "--dry-run")
    example = shlex.join([str(REPO_DIR / "examples" / "torchrun.sh"), RECIPE, AWKWARD])
    found = {}
    for name, script in (("written", written), ("example", example)):
        environment = put_commands(tmp_path / name, {"torchrun": RECORD})
        environment |= {"NNODES": "2", "NPROC_PER_NODE": "4", "MASTER_ADDR": "host-0", "MASTER_PORT": "1234"}
        for node_rank in ("0", "1"):
            bash(script, tmp_path, **environment, NODE_RANK=node_rank, RUN_ID="qwen3_vl_8b", RDZV_CONF="join_timeout=9")
        found[name] = (tmp_path / name / "words").read_text().splitlines()
    assert found["written"] == found["example"]
    common = "--nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint host-0:1234 --rdzv-id qwen3_vl_8b"
    rest = ["--max-restarts", "3", "-m", "megavlm", "train", RECIPE, AWKWARD]
    first, other = ([*common.split(), "--rdzv-conf", f"is_host={host},join_timeout=9", *rest] for host in (1, 0))
    assert found["written"] == first + other


def test_a_node_must_know_which_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = launch(
        capsys, "torchrun", RECIPE, "--nodes", "2", "--nproc-per-node", "4", "--master-addr", "a", "--dry-run"
    )
    environment = os.environ | put_commands(tmp_path, {"torchrun": RECORD})
    environment.pop("NODE_RANK", None)
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "NODE_RANK" in done.stderr
    assert not (tmp_path / "words").exists()


@pytest.mark.parametrize("place", ["container", "venv"])
def test_slurm_gives_every_rank_its_place_and_the_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    names = (
        "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS NCCL_DEBUG NCCL_IB_TIMEOUT"
    )
    names += " NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME"
    shown = " ".join(f"${name}" for name in names.split())
    python = "#!/usr/bin/env bash\n" + f'echo "{shown}"\n' + "printf '%s\\n' \"$@\"\n"
    venv = tmp_path / "v env"
    put_commands(venv / "bin", {"python": python})
    environment = put_commands(tmp_path / "slurm", SCRIPTS | {"python": python})
    for name, value in (environment | {"NCCL_DEBUG": "INFO"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    logs = tmp_path / "log folder"
    options = ["--venv", str(venv)]
    if place == "container":
        options = ["--container-image", "/im ages/a.sqsh", "--container-mounts", "/data:/data"]
    words = ["slurm", RECIPE, AWKWARD, *SLURM, *options, "--log-dir", str(logs), "--socket-ifname", "ib0"]
    assert launch(capsys, *words) == ""
    trained = ["-u", "-m", "megavlm", "train", RECIPE, AWKWARD]
    for node in (0, 1):
        lines = (logs / "4242" / f"node_{node}.log").read_text().splitlines()
        heads = [f"{4 * node + local} {local} 8 4 localhost 24242 3 INFO 22 ib0 ib0" for local in range(4)]
        assert sorted(lines) == sorted(heads + 4 * trained)
    asked = (tmp_path / "slurm" / "srun_options").read_text().splitlines()
    assert "--kill-on-bad-exit=1" in asked
    mounts = ["--container-image=/im ages/a.sqsh", f"--container-mounts={REPO_DIR}:{REPO_DIR},/data:/data"]
    assert [option for option in asked if option.startswith(("--container-image", "--container-mounts"))] == (
        mounts if place == "container" else []
    )


def test_a_rank_that_fails_ends_the_job_and_is_not_queued_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = {"python": '#!/usr/bin/env bash\n[ "$RANK" != 2 ] || exit 9\n'}
    for name, value in put_commands(tmp_path, SCRIPTS | failing).items():
        monkeypatch.setenv(name, value)
    words = ["slurm", RECIPE, *SLURM, "--container-image", "i", "--log-dir", str(tmp_path / "logs")]
    assert main(["launch", *words]) == 9
    assert not (tmp_path / "pending").exists()


def test_slurm_directives(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["slurm", RECIPE, *SLURM, "--venv", "v", "--time", "2-00:00:00", "--save-before-limit-s", "600"]
    text = launch(capsys, *words, "--partition", "gpu", "--account", "vlm", "--gpus-per-node", "0", "--dry-run")
    directives = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")}
    assert directives == {
        "--job-name=qwen3_vl_8b", "--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=3", "--exclusive", "--mem=0",
        "--time=2-00:00:00", "--partition=gpu", "--account=vlm", "--signal=B:USR1@600", "--requeue",
        "--open-mode=append", "--output=%x-%j.log",
    }  # fmt: skip
    first_command = text.index("\nset -euo")
    assert text.rindex("#SBATCH") < first_command, "sbatch reads no directive after the first command"


def test_without_slurm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", "slurm", RECIPE, *SLURM, "--venv", "v"]) == 2
    assert "sbatch: got no such command" in capsys.readouterr().err


def test_shell_scripts_pass_shellcheck(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--nodes", "2", "--nproc-per-node", "4", "--socket-ifname", "ib0"]
    slurm = ["--partition", "p", "--account", "a", "--log-dir", "a b"]
    for folder, kind, more in (
        ("venv", "slurm", [*slurm, "--venv", "a b"]),
        ("container", "slurm", [*slurm, "--container-image", "a b", "--container-mounts", "a:b"]),
        ("torchrun", "torchrun", ["--master-addr", "a"]),
    ):
        words = [kind, RECIPE, "data.image_dir=a 'folder'", *options, *more]
        launch(capsys, *words, "--write", str(tmp_path / folder))
    for name, text in SCRIPTS.items():
        (tmp_path / f"{name}.sh").write_text(text)
    scripts = [REPO_DIR / ".ci" / "run"]
    for root in (REPO_DIR / "tools", REPO_DIR / "examples", tmp_path):
        scripts += [path for path in root.rglob("*") if path.suffix in (".sh", ".sbatch")]
    assert len(scripts) >= 1 + 4 + 3 + 3 + 3
    done = subprocess.run([str(BIN_DIR / "shellcheck"), *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_dockerfile() -> None:
    """It cannot be built here; hadolint reads it, and what matters most is looked at once more."""
    dockerfile = REPO_DIR / "Dockerfile"
    done = subprocess.run([str(BIN_DIR / "hadolint"), str(dockerfile)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout
    lines = dockerfile.read_text().replace("\\\n", "").splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    by_name = {name: [value for found, value in instructions if found == name] for name, _ in instructions}
    [base] = by_name["FROM"]
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", base)
    assert int(by_name["USER"][-1]) > 0
    [health] = by_name["HEALTHCHECK"]
    assert health.endswith('CMD ["megavlm", "doctor"]')
    kept = (REPO_DIR / ".dockerignore").read_text().splitlines()
    for source in [part for value in by_name["COPY"] for part in value.split()[:-1]]:
        assert (REPO_DIR / source).exists() and f"!{source}" in kept, source
