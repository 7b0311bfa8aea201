"""Long-lived worker processes for tests: one gloo world that runs many cases, one after the other.

Starting a process that imports torch and Megatron-Core takes seconds, a case takes less: so the processes stay.
The adapter that lets Megatron-Core run without CUDA patches torch globally; it is installed in the workers only,
also for a world of one, and never in the pytest process.

    results = workers(2).run(case_function, timeout_s=60, some_argument=3)   # one result per rank

The function must stand at the top of a module under `tests/`; its arguments and results are pickled. It finds
`torch.distributed` initialised with a fresh gloo world. When a rank fails, dies or is late, the whole pool is killed,
the error shows that rank's traceback and output, and the next `run` starts a new pool.
"""

import atexit
import contextlib
import inspect
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.pool_worker import STACK_SIGNAL, WorkerSpec, work

REPO_DIR = Path(__file__).resolve().parents[1]

# A worker holds 0.3 GB once Megatron-Core is imported, and up to about 1 GB while it trains a tiny model.
MAX_PROCESSES = 10
START_TIMEOUT_S = 180
# After the first failure the other ranks get this long to report theirs.
GRACE_S = 1.0
MAX_LOG_CHARACTERS = 4000


class WorkerError(RuntimeError):
    """A case failed: `tracebacks` holds what each failing rank raised."""

    def __init__(self, message: str, tracebacks: dict[int, str]) -> None:
        super().__init__(message)
        self.tracebacks = tracebacks


class WorkerTimeoutError(WorkerError):
    """A case took longer than its time limit."""


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    connection: Connection
    log_path: Path
    log_start: int = 0

    def log_tail(self) -> str:
        """What the worker printed since the case began."""
        with self.log_path.open("rb") as file:
            file.seek(self.log_start)
            return file.read().decode(errors="replace")[-MAX_LOG_CHARACTERS:]


@dataclass
class _Answers:
    """What has come back of one case, by rank."""

    results: dict[int, Any] = field(default_factory=dict)
    tracebacks: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.results) + len(self.tracebacks)


class WorkerPool:
    """`world_size` processes that form one gloo world. Started by the first `run`, restarted after a failure.

    With `transformer_engine`, they have the stand-in for that version (`tests/stand_ins`); with the device `cuda`, each
    has a GPU.
    """

    def __init__(self, world_size: int, transformer_engine: str = "", device: str = "cpu") -> None:
        assert world_size >= 1
        self.world_size, self.transformer_engine, self.device = world_size, transformer_engine, device
        self._workers: list[_Worker] = []
        self._store: Any = None
        self._directory: Path | None = None

    @property
    def process_ids(self) -> list[int]:
        """Ids of the live processes by rank; empty when the pool is not running."""
        return [worker.process.pid or 0 for worker in self._workers]

    def run(self, function: Callable[..., Any] | str, /, timeout_s: float = 120.0, **kwargs: Any) -> list[Any]:
        """Run a function on every rank at once.

        Args:
            function: a module-level function, or its `package.module:name`.
            timeout_s: time limit of the case, without the start of the pool.
            **kwargs: arguments of the function, the same for every rank.

        Returns:
            The results by rank.

        Raises:
            WorkerError: a rank raised or died.
            WorkerTimeoutError: a rank was late.
        """
        name = function if isinstance(function, str) else function_name(function)
        if not self._workers:
            self._start()
        task = pickle.dumps((name, timeout_s, kwargs))
        for worker in self._workers:
            worker.log_start = worker.log_path.stat().st_size
            # A worker that died while idle breaks the pipe here; `_collect` then reports it with its exit code.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                worker.connection.send_bytes(task)
        return self._collect(name, timeout_s)

    def close(self) -> None:
        """Kill the processes and what they started. The pool can be used again."""
        workers, self._workers = self._workers, []
        for worker in workers:
            assert worker.process.pid is not None
            # Each worker leads a process group of its own, with the checkpoint writers that it may have forked.
            # Before it became the leader there is no such group yet.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.process.pid, signal.SIGKILL)
            worker.process.kill()
            worker.process.join()
            worker.process.close()
            worker.connection.close()
        self._store = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _start(self) -> None:
        # torch is imported here, not above: pytest runs that need no pool stay quick.
        import torch.distributed as dist

        self._directory = Path(tempfile.mkdtemp(prefix=f"megavlm-pool{self.world_size}-"))
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        # "spawn": a forked child would inherit torch's threads and locks in an unknown state.
        context = multiprocessing.get_context("spawn")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            log_path = self._directory / f"rank{rank}.log"
            log_path.touch()
            spec = WorkerSpec(
                rank=rank,
                world_size=self.world_size,
                store_port=self._store.port,
                repo_dir=str(REPO_DIR),
                log_path=str(log_path),
                transformer_engine=self.transformer_engine,
                device=self.device,
            )
            # Not a daemon: daemons may not have children, and saving a checkpoint starts some.
            process = context.Process(target=work, args=(theirs, spec), name=f"pool{self.world_size}-rank{rank}")
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours, log_path))
        self._collect("start of the pool", START_TIMEOUT_S)

    def _collect(self, name: str, timeout_s: float) -> list[Any]:
        """One answer of every rank, or kill the pool and raise."""
        answers = _Answers()
        deadline = time.monotonic() + timeout_s
        try:
            while len(answers) < self.world_size:
                if answers.tracebacks:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
                if not self._receive(answers, deadline - time.monotonic()):
                    break
        except BaseException:  # Ctrl-C: answers that come later would be taken for those of the next case
            self.close()
            raise
        if len(answers.results) == self.world_size:
            return [answers.results[rank] for rank in range(self.world_size)]
        if not answers.tracebacks:
            self._dump_stacks(answers)
        message, kind = self._explain(name, timeout_s, answers)
        self.close()
        raise kind(message, answers.tracebacks)

    def _dump_stacks(self, answers: _Answers) -> None:
        """Have the late ranks write where they are into their logs."""
        late = [worker for rank, worker in enumerate(self._workers) if rank not in answers.results]
        for worker in late:
            assert worker.process.pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.process.pid, STACK_SIGNAL)
        time.sleep(GRACE_S)

    def _receive(self, answers: _Answers, wait_s: float) -> bool:
        """Take what has arrived; False when nothing did in time."""
        pending = {
            worker.connection: rank
            for rank, worker in enumerate(self._workers)
            if rank not in answers.results and rank not in answers.tracebacks
        }
        ready = wait(list(pending), max(wait_s, 0.0))
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = pending[connection]
            try:
                succeeded, value = pickle.loads(connection.recv_bytes())
            except (EOFError, ConnectionResetError):
                process = self._workers[rank].process
                process.join(GRACE_S)
                succeeded, value = False, f"the process died with exit code {process.exitcode}\n"
            (answers.results if succeeded else answers.tracebacks)[rank] = value
        return bool(ready)

    def _explain(self, name: str, timeout_s: float, answers: _Answers) -> tuple[str, type[WorkerError]]:
        """The error's text: each different traceback once, with the output of the first rank that raised it."""
        waiting = [r for r in range(self.world_size) if r not in answers.results and r not in answers.tracebacks]
        parts, kind = [f"{name} on {self.world_size} ranks"], WorkerError
        if answers.tracebacks:
            parts[0] += f": failed on rank {sorted(answers.tracebacks)}, no answer from rank {waiting}"
        else:
            kind = WorkerTimeoutError
            parts[0] += f": no answer from rank {waiting} within {timeout_s:g} s"
        shown: set[str] = set()
        for rank in sorted(answers.tracebacks) or waiting:
            text = answers.tracebacks.get(rank, "")
            if text not in shown or not text:
                parts.append(f"--- rank {rank}\n{text}--- output of rank {rank}\n{self._workers[rank].log_tail()}")
            shown.add(text)
        return "\n".join(parts), kind


class PoolKeeper:
    """One pool per world size and stand-in, made when asked for; the longest unused are closed to bound the memory."""

    def __init__(self, max_processes: int = MAX_PROCESSES) -> None:
        self._max_processes = max_processes
        self._pools: dict[tuple[int, str, str], WorkerPool] = {}
        atexit.register(self.close)

    def __call__(self, world_size: int, transformer_engine: str = "", device: str = "cpu") -> WorkerPool:
        """The pool of this size, not yet started perhaps; see `WorkerPool` for the rest."""
        key = (world_size, transformer_engine, device)
        pool = self._pools.pop(key, None) or WorkerPool(*key)
        while self._pools and sum(size for size, *_ in self._pools) + world_size > self._max_processes:
            longest_unused = next(iter(self._pools))
            self._pools.pop(longest_unused).close()
        self._pools[key] = pool
        return pool

    def close(self) -> None:
        """Close every pool."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()


def function_name(function: Callable[..., Any]) -> str:
    """The `package.module:name` under which a worker finds a test's function."""
    name = function.__qualname__
    assert "<" not in name and "." not in name, f"{name} must stand at the top of its module"
    path = Path(inspect.getsourcefile(function) or "").resolve()
    # By the file, because pytest may have loaded the module under another name.
    module = ".".join(path.relative_to(REPO_DIR).with_suffix("").parts)
    return f"{module}:{name}"
