"""`megavlm launch`: start a run on this machine, by torchrun on several, or by SLURM; or write the script that does."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megavlm.cli.launch_scripts import Job

SUMMARY = "start a run here, by torchrun or by SLURM, or write the script that does"

EPILOG = """\
Checks the recipe and its layout for all processes first. Then:
  local     starts the processes on this machine, as `megavlm train --nproc` does
  torchrun  starts this node's part (NODE_RANK says which it is); the first node is --master-addr
  slurm     submits an sbatch script: a container (enroot and pyxis) or a virtual environment; shortly before the time
            limit the run saves, is queued again, and goes on
--dry-run prints the script instead, --write puts it into a folder. docs/gpu.md explains what is in it.

examples:
  megavlm launch local RECIPE.yaml --nproc-per-node 4
  megavlm launch torchrun RECIPE.yaml --nodes 2 --nproc-per-node 8 --master-addr node0 --dry-run
  megavlm launch slurm RECIPE.yaml train.seed=2 --nodes 4 --nproc-per-node 8 --venv .venv --time 08:00:00 --dry-run
"""

_KINDS = ("local", "torchrun", "slurm")
_FILE_NAMES = {"local": "{}.sh", "torchrun": "{}.torchrun.sh", "slurm": "{}.sbatch"}
_OPTIONS: dict[str, tuple[tuple[str, ...], int | str, str]] = {
    "nodes": (_KINDS, 1, "machines (default: 1)"),
    "nproc_per_node": (_KINDS, 1, "processes on each, one for each GPU (default: 1)"),
    "master_addr": (("torchrun",), "", "host name of the first node (default: localhost, for one node)"),
    "master_port": (("torchrun",), 29500, "free port there (default: 29500)"),
    "max_restarts": (("torchrun",), 3, "how often to start again after a failure (default: 3)"),
    "socket_ifname": (("torchrun", "slurm"), "", "network interface over which ranks meet, e.g. ib0"),
    "container_image": (("slurm",), "", "image for pyxis, e.g. /images/megavlm.sqsh"),
    "container_mounts": (("slurm",), "", "SOURCE:TARGET[,...] beside the working folder"),
    "venv": (("slurm",), "", "virtual environment, instead of a container"),
    "time": (("slurm",), "04:00:00", "time limit (default: 04:00:00)"),
    "partition": (("slurm",), "", "partition"),
    "account": (("slurm",), "", "account"),
    "gpus_per_node": (("slurm",), -1, "GPUs to ask for (default: one for each process; 0: none)"),
    "cpus_per_task": (("slurm",), 8, "CPUs of each process and its data workers (default: 8)"),
    "save_before_limit_s": (("slurm",), 300, "seconds before the time limit at which to save (default: 300)"),
    "log_dir": (("slurm",), "slurm_logs", "folder for the nodes' logs (default: slurm_logs)"),
}
"""Option -> (kinds that take it, default, help)."""

_LEAST = {"nodes": 1, "nproc_per_node": 1, "master_port": 1, "max_restarts": 0, "cpus_per_task": 1, "gpus_per_node": -1,
          "save_before_limit_s": 60}  # fmt: skip
_TIME = re.compile(r"(\d+-)?\d{1,2}:\d{2}:\d{2}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.epilog = EPILOG
    parser.add_argument("kind", choices=_KINDS, help="who starts the processes")
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="recipe keys to change")
    for name, (kinds, default, text) in _OPTIONS.items():
        whose = "" if kinds == _KINDS else f"{' and '.join(kinds)}: "
        parser.add_argument(_flag(name), type=type(default), default=None, help=whose + text)
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--dry-run", action="store_true", help="print the script and start nothing")
    shown.add_argument("--write", default="", metavar="DIR", help="write the script into a folder and start nothing")


def run(args: argparse.Namespace) -> int:
    """Check, then start, print or write."""
    from megavlm.cli.launch_scripts import Job
    from megavlm.config.load import load_recipe
    from megavlm.config.validate import validate_layout, validate_recipe

    command = _command(args)
    _set_defaults(args)
    _check_options(args)
    recipe = load_recipe(args.recipe, args.overrides)
    # What the nodes see need not be here, nor what is in a container.
    validate_recipe(recipe, check_paths=args.kind == "local")
    validate_layout(recipe, args.nodes * args.nproc_per_node)
    words = ("train", args.recipe, *args.overrides)
    job = Job(recipe.name, args.nodes, args.nproc_per_node, words, args.socket_ifname)
    script = _script(args, command, job)
    if args.dry_run:
        sys.stdout.write(script)
        return 0
    if args.write:
        return _write(Path(args.write) / _FILE_NAMES[args.kind].format(recipe.name), script)
    return _start(args, job, script)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _command(args: argparse.Namespace) -> str:
    """The command line that this is, whatever the order of its words was."""
    words = ["megavlm", "launch", args.kind, args.recipe, *args.overrides]
    for name in _OPTIONS:
        if vars(args)[name] is not None:
            words += [_flag(name), str(vars(args)[name])]
    return shlex.join(words)


def _set_defaults(args: argparse.Namespace) -> None:
    """Fill in what was not given; what was given must belong to the kind of launch."""
    from megavlm.errors import use_error

    for name, (kinds, default, _) in _OPTIONS.items():
        given = vars(args)[name]
        if given is None:
            setattr(args, name, default)
        elif args.kind not in kinds:
            raise use_error(_flag(name), given, f"it with {' or '.join(kinds)} only", f"drop it, or launch {kinds[0]}")


def _check_options(args: argparse.Namespace) -> None:
    from megavlm.errors import use_error

    for name, least in _LEAST.items():
        if vars(args)[name] < least:
            raise use_error(_flag(name), vars(args)[name], f"at least {least}", "raise it")
    if args.kind == "local" and args.nodes != 1:
        raise use_error("--nodes", args.nodes, "1 with local", "launch torchrun or slurm")
    if args.kind == "torchrun" and args.nodes != 1 and not args.master_addr:
        raise use_error("--master-addr", "nothing", "the first node's host name", "e.g. --master-addr node0")
    if args.kind == "slurm":
        if bool(args.container_image) == bool(args.venv):
            got = "both" if args.venv else "neither"
            raise use_error("--container-image, --venv", got, "one of them", "e.g. --venv .venv")
        if args.container_mounts and args.venv:
            raise use_error("--container-mounts", "it with --venv", "a container", "drop it")
        if not _TIME.fullmatch(args.time):
            raise use_error("--time", f"`{args.time}`", "[D-]HH:MM:SS", "e.g. --time 1-00:00:00")


def _script(args: argparse.Namespace, command: str, job: "Job") -> str:
    from megavlm.cli.launch_scripts import Rendezvous, Slurm, local_script, slurm_script, torchrun_script

    if args.kind == "local":
        return local_script(command, job)
    if args.kind == "torchrun":
        meeting = Rendezvous(args.master_addr or "localhost", args.master_port, args.max_restarts)
        return torchrun_script(command, job, meeting)
    asked = {field.name: vars(args)[field.name] for field in fields(Slurm)}
    if args.gpus_per_node < 0:
        asked["gpus_per_node"] = job.nproc_per_node
    return slurm_script(command, job, Slurm(**asked))


def _write(path: Path, script: str) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script, encoding="utf-8")
    path.chmod(0o755)
    sys.stdout.write(f"{path}\n")
    return 0


def _start(args: argparse.Namespace, job: "Job", script: str) -> int:
    from megavlm.errors import use_error

    if args.kind == "local":
        from megavlm.cli.launch_scripts import local_words
        from megavlm.cli.main import main

        return main([*local_words(job), *(["--debug"] if args.debug else [])])
    if args.kind == "torchrun":
        sys.stdout.flush()
        os.execvp("bash", ["bash", "-c", script])
    if shutil.which("sbatch") is None:
        raise use_error("sbatch", "no such command", "SLURM on this machine", "--write DIR writes the script instead")
    return subprocess.run(["sbatch"], input=script, text=True).returncode
