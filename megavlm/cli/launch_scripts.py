"""The scripts that start a run: texts, made from plain values. `templates/` holds their wording.

Every value is quoted for the shell where it enters a script, but for what is a number or a checked name.
"""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import jinja2

_FOLDER = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Job:
    """What is started, whoever starts it."""

    name: str
    """Of the recipe: letters, digits, `.`, `_` and `-`."""
    nodes: int
    nproc_per_node: int
    words: tuple[str, ...]
    """Of `megavlm`: `train`, the recipe and its overrides."""
    socket_ifname: str = ""
    """Network interface for NCCL and gloo; empty: they choose."""


@dataclass(frozen=True)
class Rendezvous:
    """Where torchrun's agents meet."""

    address: str
    """Host of the first node."""
    port: int
    max_restarts: int
    """How often the processes are started again after one has failed or a node was lost."""


@dataclass(frozen=True)
class Slurm:
    """What sbatch is asked for. Empty texts and 0 GPUs are left out."""

    container_image: str
    """For pyxis: an enroot image file, or a registry's name; empty: no container."""
    container_mounts: str
    """`SOURCE:TARGET`, several with commas, beside the working folder, which is always there."""
    venv: str
    """Without a container: the virtual environment, as the nodes see it."""
    time: str
    """`HH:MM:SS` or `D-HH:MM:SS`."""
    partition: str
    account: str
    gpus_per_node: int
    cpus_per_task: int
    save_before_limit_s: int
    """Seconds before the time limit at which the run is asked to save."""
    log_dir: str
    """Gets a folder for each job, with a log of each node."""


def local_script(command: str, job: Job) -> str:
    """A shell script that trains with several processes on one machine."""
    return f"#!/usr/bin/env bash\n# Written by: {command}\nexec megavlm {shlex.join(local_words(job))}\n"


def local_words(job: Job) -> list[str]:
    """Words of `megavlm` that do the same."""
    return [*job.words, *(["--nproc", str(job.nproc_per_node)] if job.nproc_per_node > 1 else [])]


def torchrun_script(command: str, job: Job, rendezvous: Rendezvous) -> str:
    """A shell script that each node starts with its NODE_RANK: torchrun with a c10d rendezvous on the first node."""
    quoted = {**asdict(rendezvous), "address": shlex.quote(rendezvous.address)}
    return _render("torchrun.sh.j2", command, job, {"rendezvous": quoted}, trace_prefix="")


def slurm_script(command: str, job: Job, slurm: Slurm) -> str:
    """An sbatch script, for a container or a virtual environment; near its time limit it saves and is queued again."""
    quoted = {
        name: shlex.quote(value) if isinstance(value, str) and value else value for name, value in asdict(slurm).items()
    }
    quoted["container_mounts"] = '"$PWD:$PWD"' + (f",{quoted['container_mounts']}" if slurm.container_mounts else "")
    quoted["python"] = "python" if slurm.container_image else shlex.quote(f"{slurm.venv}/bin/python")
    return _render("slurm.sbatch.j2", command, job, {"slurm": quoted}, trace_prefix="$log_dir/collectives_rank_")


def _render(template: str, command: str, job: Job, values: Mapping[str, object], trace_prefix: str) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # a shell's text; what needs quotes has them
    )
    settings = environment.get_template("settings.sh.j2").render(
        socket_ifname=shlex.quote(job.socket_ifname) if job.socket_ifname else "", trace_prefix=trace_prefix
    )
    return environment.get_template(template).render(
        command=command, job=job, words=shlex.join(job.words), settings=settings, **values
    )
