"""`megavlm doctor`: what this machine has, what is missing and how to get it, and whether it can train at all."""

import argparse
import contextlib
import json
import os
import platform
import resource
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megavlm import __version__
from megavlm.platform import capabilities
from megavlm.platform.capabilities import Capability

SUMMARY = "show what this machine has, what is missing, and the command that installs it"
# Without these no run starts; without psutil megatron-core's checkpoint writer dies and a save hangs.
REQUIRED = ("torch", "megatron-core", "transformers", "psutil")
_GIB = 2**30
# Data workers and NCCL pass tensors through shared memory; Docker gives a container 64 MiB unless told otherwise.
_LEAST_SHARED_MEMORY_BYTES = _GIB


@dataclass(frozen=True)
class Machine:
    """The machine itself; sizes in bytes, None where the system has no such thing or no limit."""

    system: str
    python: str
    cpu_cores: int
    memory_bytes: int
    disk_free_bytes: int
    shared_memory_bytes: int | None
    max_open_files: int | None
    max_locked_memory_bytes: int | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    parser.epilog = (
        "example:\n  megavlm doctor\n  megavlm doctor --json | python -m json.tool\n\n"
        "exit codes: 0 this machine can train, 1 something that every run needs is missing"
    )


def run(args: argparse.Namespace) -> int:
    """Probe the machine and print what was found; 0 when training is possible, else 1."""
    with contextlib.redirect_stdout(sys.stderr):  # some packages greet when imported; --json must stay JSON
        found = capabilities.probe_all()
    machine = inspect_machine()
    obstacles = training_obstacles(found)
    if args.json:
        sys.stdout.write(json.dumps(_as_dict(found, machine, obstacles), indent=2) + "\n")
    else:
        _show(found, machine, obstacles)
    return 1 if obstacles else 0


def chosen_platform(found: tuple[Capability, ...]) -> str:
    """Return which platform a run would use: `cuda` where a device can be used, else `cpu`."""
    return "cuda" if _by_name(found)["cuda"].available else "cpu"


def training_obstacles(found: tuple[Capability, ...]) -> tuple[str, ...]:
    """Name the missing capabilities without which no training run can start on this machine."""
    backend = {"cuda": "nccl", "cpu": "gloo"}[chosen_platform(found)]
    by_name = _by_name(found)
    return tuple(name for name in (*REQUIRED, backend) if not by_name[name].available)


def inspect_machine() -> Machine:
    """Measure the machine, as far as this process may use it (affinity, container limits)."""
    shared = Path("/dev/shm")
    return Machine(
        system=platform.platform(),
        python=platform.python_version(),
        cpu_cores=_usable_cores(),
        memory_bytes=_memory_bytes(),
        disk_free_bytes=shutil.disk_usage(".").free,
        shared_memory_bytes=shutil.disk_usage(shared).total if shared.is_dir() else None,
        max_open_files=_soft_limit(resource.RLIMIT_NOFILE),
        max_locked_memory_bytes=_soft_limit(resource.RLIMIT_MEMLOCK),
    )


def _by_name(found: tuple[Capability, ...]) -> dict[str, Capability]:
    return {capability.name: capability for capability in found}


def _usable_cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int:
    """Return the memory of the machine, or of the container where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit_file = Path("/sys/fs/cgroup/memory.max")
    limit = limit_file.read_text().strip() if limit_file.is_file() else "max"
    return min(total, int(limit)) if limit.isdigit() else total


def _soft_limit(kind: int) -> int | None:
    limit, _ = resource.getrlimit(kind)
    return None if limit == resource.RLIM_INFINITY else limit


def _as_dict(found: tuple[Capability, ...], machine: Machine, obstacles: tuple[str, ...]) -> dict[str, object]:
    return {
        "megavlm": __version__,
        "platform": chosen_platform(found),
        "can_train": not obstacles,
        "missing": list(obstacles),
        "machine": asdict(machine),
        "capabilities": [asdict(capability) for capability in found],
    }


def _show(found: tuple[Capability, ...], machine: Machine, obstacles: tuple[str, ...]) -> None:
    console = Console(highlight=False)
    console.print(_machine_table(machine))
    console.print(_capability_table(found))
    missing = [capability for capability in found if not capability.available]
    if missing:
        console.print("To install what is missing:", style="bold")
        for capability in missing:
            # One unwrapped line each, to be copied.
            console.print(f"  {capability.name}: {capability.install}", soft_wrap=True, markup=False)
    console.print()
    if obstacles:
        console.print(f"Training is not possible here: {', '.join(obstacles)} missing.", style="bold red")
    else:
        console.print(f"Training is possible here, on the platform `{chosen_platform(found)}`.", style="bold green")


def _machine_table(machine: Machine) -> Table:
    table = Table(title=f"megavlm {__version__}", title_justify="left", show_header=False)
    table.add_row("system", machine.system)
    table.add_row("Python", machine.python)
    table.add_row("CPU cores", str(machine.cpu_cores))
    table.add_row("memory", _size(machine.memory_bytes))
    table.add_row("free disk here", _size(machine.disk_free_bytes))
    shared = "there is no /dev/shm"
    if machine.shared_memory_bytes is not None:
        shared = _size(machine.shared_memory_bytes)
        if machine.shared_memory_bytes < _LEAST_SHARED_MEMORY_BYTES:
            shared += " (too small for data workers and NCCL: docker run --ipc=host, or --shm-size=8g)"
    table.add_row("shared memory", shared)
    table.add_row("open files", "no limit" if machine.max_open_files is None else str(machine.max_open_files))
    locked = machine.max_locked_memory_bytes
    table.add_row("locked memory", "no limit" if locked is None else _size(locked))
    return table


def _capability_table(found: tuple[Capability, ...]) -> Table:
    table = Table()
    for heading in ("capability", "", "version", "needed for", "detail"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "capability")
    for capability in found:
        mark = "[green]yes[/green]" if capability.available else "[yellow]no[/yellow]"
        # Brackets in a detail are the package's own words, not markup.
        table.add_row(capability.name, mark, capability.version, capability.needed_for, escape(capability.detail))
    return table


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB else f"{num_bytes / 2**20:.1f} MiB"
