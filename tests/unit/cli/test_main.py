import argparse
import errno
import importlib
import subprocess
import sys
import types
from collections.abc import Callable

import pytest

from megavlm import __version__
from megavlm.cli import data
from megavlm.cli import main as frame
from megavlm.errors import RunError, UseError, use_error

Run = Callable[[argparse.Namespace], int]
Install = Callable[[Run], None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put one command, `probe RECIPE [key=value ...] [--nproc N]`, in place of the real ones."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("recipe")
        parser.add_argument("overrides", nargs="*")
        parser.add_argument("--nproc", type=int, default=1)
        parser.epilog = "example:\n  megavlm probe recipe.yaml"

    def put(run: Run) -> None:
        module = types.ModuleType("tests_probe_command")
        vars(module).update(SUMMARY="probe things", add_arguments=add_arguments, run=run)
        monkeypatch.setitem(sys.modules, "tests_probe_command", module)
        monkeypatch.setattr(frame, "COMMANDS", {"probe": "tests_probe_command"})

    return put


def raising(error: BaseException) -> Run:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


def test_words_reach_the_command_in_any_order(install: Install) -> None:
    seen: list[argparse.Namespace] = []

    def run(args: argparse.Namespace) -> int:
        seen.append(args)
        return 7

    install(run)
    for words in (
        ["probe", "r.yaml", "a.b=1", "c=-2", "--nproc", "2"],
        ["probe", "--nproc", "2", "r.yaml", "a.b=1", "c=-2"],
        ["probe", "r.yaml", "--nproc", "2", "a.b=1", "c=-2"],
        ["--debug", "probe", "r.yaml", "a.b=1", "--nproc=2", "c=-2"],
    ):
        assert frame.main(words) == 7
    assert {(args.recipe, tuple(args.overrides), args.nproc) for args in seen} == {("r.yaml", ("a.b=1", "c=-2"), 2)}


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (use_error("train.lr", 3, "less", "lower it"), 2, "error: train.lr: got 3; expected less; fix: lower it"),
        (UseError("first\n  second\n"), 2, "error: first second"),
        (RunError("step 7: loss is nan"), 1, "error: step 7: loss is nan"),
        (OSError(errno.ENOSPC, "No space left on device", "x.pt"), 1,
         "error: [Errno 28] No space left on device: 'x.pt'"),
        (KeyError("oops"), 1, "internal error: KeyError: 'oops' (--debug shows where)"),
        (ValueError("a\nb"), 1, "internal error: ValueError: a b (--debug shows where)"),
        (AssertionError(), 1, "internal error: AssertionError:  (--debug shows where)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)  # fmt: skip
def test_errors_become_one_line_and_a_code(
    install: Install, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    install(raising(error))
    assert frame.main(["probe", "r.yaml"]) == code
    captured = capsys.readouterr()
    assert captured.err == f"megavlm: {line}\n"
    assert captured.out == ""


@pytest.mark.parametrize("words", [["--debug", "probe", "r.yaml"], ["probe", "r.yaml", "--debug"]])
def test_debug_shows_the_traceback(install: Install, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    install(raising(ZeroDivisionError("here")))
    assert frame.main(words) == 1
    found = capsys.readouterr().err
    assert "Traceback (most recent call last)" in found
    assert 'in run\n    raise error' in found  # fmt: skip
    assert found.endswith("megavlm: internal error: ZeroDivisionError: here\n")


def test_the_rank_is_named_under_torchrun(
    install: Install, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(raising(RunError("loss is nan")))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert frame.main(["probe", "r.yaml"]) == 1
    assert capsys.readouterr().err == "megavlm: error: rank 3: loss is nan\n"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["prboe"], "unknown command `prboe` (there are probe)"),
        (["probe"], "arguments are required: recipe"),
        (["probe", "r.yaml", "--nix"], "unrecognized arguments: --nix; fix: `megavlm probe --help` shows how"),
        (["probe", "r.yaml", "--nproc", "two"], "invalid int value: 'two'"),
        (["--nix", "probe", "r.yaml"], "unrecognized arguments: --nix"),
    ],
)
def test_wrong_words_are_one_line_and_code_2(
    install: Install, capsys: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    install(lambda args: 0)
    assert frame.main(words) == 2
    found = capsys.readouterr().err
    assert found.startswith("megavlm: error: ") and part in found
    assert found.count("\n") == 1


def test_help_version_and_nothing(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install(lambda args: 0)
    assert frame.main(["--version"]) == 0
    assert capsys.readouterr().out == f"megavlm {__version__}\n"
    for words in (["--help"], ["-h", "probe"]):
        assert frame.main(words) == 0
        found = capsys.readouterr().out
        assert "probe things" in found and "megavlm doctor" in found
    assert frame.main(["probe", "--help"]) == 0
    assert "megavlm probe recipe.yaml" in capsys.readouterr().out
    assert frame.main([]) == 2
    captured = capsys.readouterr()
    assert "probe things" in captured.err and captured.out == ""


@pytest.mark.parametrize("name", frame.COMMANDS)
def test_every_command_explains_itself_with_an_example(name: str) -> None:
    module = importlib.import_module(frame.COMMANDS[name])
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert f"megavlm {name}" in (parser.epilog or "")
    assert module.SUMMARY


_MEMBERS = [["data", name] for name in data.COMMANDS]


@pytest.mark.parametrize(
    "words",
    [["--version"], ["--help"], *([*words, "--help"] for words in [*([name] for name in frame.COMMANDS), *_MEMBERS])],
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = f"""
import sys
from megavlm.cli.main import main
assert main({words!r}) == 0
heavy = {{"torch", "megatron", "transformers"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_python_dash_m() -> None:
    done = subprocess.run([sys.executable, "-m", "megavlm", "nix"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("megavlm: error: unknown command `nix`")
