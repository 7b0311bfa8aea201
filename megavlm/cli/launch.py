"""Start several processes of a command on this machine, under the environment that torchrun sets, and report like one.

Not through torch's elastic agent, which cannot be made to behave as a run must: it kills processes that take longer to
save after SIGTERM than it waits, and ends with an error although they end well; it does not say which of the failed
processes failed first; and it leaves behind what a killed process had started. On several machines torchrun, SLURM and
the like start the processes, by scripts of `megavlm launch` (launch_command.py), and `megavlm train` joins them.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from megavlm.errors import RunError

FORWARDED = (signal.SIGTERM, signal.SIGUSR1)
"""What the processes handle themselves: they save and end."""

SHUTDOWN_TIMEOUT_S = 2.0
"""After a failure the others get this long to end by themselves; they cannot go on, and what they saved is complete."""

_POLL_S = 0.05
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def launch(num_processes: int, words: Sequence[str]) -> int:
    """Run `megavlm WORDS` in so many processes; one that fails ends the others.

    Returns:
        0, or the exit code of the process that failed (its message is on stderr already).

    Raises:
        RunError: a signal killed a process.
        KeyboardInterrupt: Ctrl-C; the processes have been killed.
    """
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with _forwarding(processes) as received:
            port = _free_port()
            for rank in range(num_processes):
                processes.append(_start(rank, num_processes, port, words))
            exit_codes = _wait(processes)
    finally:
        _kill(processes)
    failed = {rank: code for rank, code in enumerate(exit_codes) if code}
    return _verdict(failed, received) if failed else 0


def _start(rank: int, num_processes: int, port: int, words: Sequence[str]) -> subprocess.Popen[bytes]:
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": num_processes,
        "LOCAL_WORLD_SIZE": num_processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    threads = max(1, len(os.sched_getaffinity(0)) // num_processes)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | {name: str(value) for name, value in place.items()}
    # A session of its own: Ctrl-C comes here alone, and what the process starts is killed with it.
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "megavlm", *words],
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_end_with_launcher,
    )


def _end_with_launcher() -> None:
    """Also when the launcher is killed, its processes end (Linux; Popen's child runs this)."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def _forwarding(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Hand signals on to the processes; yields those that have been received."""
    received: list[int] = []

    def forward(number: int, _frame: Any) -> None:
        received.append(number)
        for process in processes:
            # Not to its whole group: what prepares its data must go on until it has saved.
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[int | None]:
    """Exit codes when all have ended, or some time after one has failed; None: still there."""
    exit_codes = [process.poll() for process in processes]
    while None in exit_codes and not any(exit_codes):
        time.sleep(_POLL_S)
        exit_codes = [process.poll() for process in processes]
    deadline = time.monotonic() + SHUTDOWN_TIMEOUT_S
    while None in [process.poll() for process in processes] and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return exit_codes


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Every process, and what it has started, dead ones' children included."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _verdict(failed: dict[int, int], received: Sequence[int]) -> int:
    """The exit code for what the first processes to fail ended with, by rank (negative: a signal)."""
    killed = {rank: signal.Signals(-code) for rank, code in failed.items() if code < 0}
    if killed and all(number in received for number in killed.values()):
        raise RunError(f"stopped by {signal.Signals(received[0]).name} before training had begun")
    for rank, number in killed.items():
        hint = "; is there enough memory?" if number == signal.SIGKILL else ""
        raise RunError(f"rank {rank} was killed by {number.name}{hint}")
    # 2 before 1: a rank that only lost its connection to the one at fault ends with 1.
    return max(failed.values())
