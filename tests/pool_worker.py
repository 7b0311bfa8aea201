"""The worker's side of `tests/pool.py`: joins the gloo world, then runs what it is told until it is killed.

This module is imported before the environment is set: it must import neither torch nor megatron at its top.
"""

import contextlib
import datetime
import faulthandler
import gc
import importlib
import os
import pickle
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from typing import Any

# On this signal a worker writes the stack of each thread to its log: the pool asks for it when a case is late.
STACK_SIGNAL = signal.SIGUSR1
# The pool's own time limit comes first, with a better message than gloo's.
GLOO_EXTRA_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class WorkerSpec:
    """Who a worker is, and where it finds the others: `store_port` on 127.0.0.1.

    `transformer_engine` is the version that the stand-in stands in for; empty: there is none, as on any machine
    without a GPU. `device` is `cpu`, or `cuda`: then the ranks have a GPU each, and speak over NCCL.
    """

    rank: int
    world_size: int
    store_port: int
    repo_dir: str
    log_path: str
    transformer_engine: str = ""
    device: str = "cpu"


def work(pipe: connection.Connection, spec: WorkerSpec) -> None:
    """Serve cases until the parent goes away."""
    os.setsid()  # leader of a process group, so that the pool can kill what a case has started
    _redirect_output(spec.log_path)
    faulthandler.register(STACK_SIGNAL, all_threads=True)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        _prepare(spec)
    except BaseException:
        _answer(pipe, False, traceback.format_exc())
        return
    _answer(pipe, True, None)
    with contextlib.suppress(EOFError):  # the parent closed the pipe
        num_cases = 0
        while True:
            name, timeout_s, kwargs = pickle.loads(pipe.recv_bytes())
            num_cases += 1
            _serve(pipe, spec, f"case{num_cases}", name, timeout_s, kwargs)


def _serve(
    pipe: connection.Connection, spec: WorkerSpec, case: str, name: str, timeout_s: float, kwargs: dict[str, Any]
) -> None:
    try:
        _reset()
        _join_world(spec, case, timeout_s)
        module, _, attribute = name.partition(":")
        result = vars(importlib.import_module(module))[attribute](**kwargs)
        # Plain pickle: multiprocessing would send tensors as handles to memory that dies with this process.
        answer = pickle.dumps((True, result))
    except BaseException:  # also SystemExit: a case that ends the process must not end the pool
        answer = pickle.dumps((False, traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send_bytes(answer)
    gc.collect()


def _answer(pipe: connection.Connection, succeeded: bool, value: Any) -> None:
    pipe.send_bytes(pickle.dumps((succeeded, value)))


def _redirect_output(log_path: str) -> None:
    """Send file descriptors 1 and 2, those of C++ code too, to the log."""
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _exit_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _prepare(spec: WorkerSpec) -> None:
    """Environment, import path, the CPU adapter: in this order, before anything imports megatron."""
    if spec.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the pool is the CPU platform, also on a machine with GPUs
    os.environ.update(
        RANK=str(spec.rank),
        WORLD_SIZE=str(spec.world_size),
        LOCAL_RANK=str(spec.rank),
        LOCAL_WORLD_SIZE=str(spec.world_size),
    )
    if spec.repo_dir not in sys.path:
        sys.path.insert(0, spec.repo_dir)
    import torch

    from megavlm.platform import cpu

    if spec.transformer_engine:
        from tests.stand_ins.te_surface import install

        install(spec.transformer_engine)
    torch.set_num_threads(1)
    assert cpu.install() == (spec.device == "cpu"), "the CPU adapter is there for the CPU, and only then"
    if spec.device == "cuda":
        torch.cuda.set_device(spec.rank)
    gc.collect()
    gc.freeze()  # what the imports made stays: the collections between cases need not look at it


def _join_world(spec: WorkerSpec, case: str, timeout_s: float) -> None:
    import torch.distributed as dist

    timeout = datetime.timedelta(seconds=timeout_s + GLOO_EXTRA_TIMEOUT_S)
    # A client of its own per case: the prefix keeps keys apart, the time-out is the case's.
    store = dist.TCPStore("127.0.0.1", spec.store_port, is_master=False, timeout=timeout)
    prefixed = dist.PrefixStore(case, store)
    backend = {"cpu": "gloo", "cuda": "nccl"}[spec.device]
    dist.init_process_group(backend, store=prefixed, rank=spec.rank, world_size=spec.world_size, timeout=timeout)


def _reset() -> None:
    """Leave nothing of the case before: neither its layout nor its groups.

    Runs when the next case arrives, because by then every rank has answered and none is still sending.
    """
    import torch.distributed as dist

    wrap = sys.modules.get("megavlm.parallel.wrap")
    if wrap is not None:
        wrap.release()
    groups = sys.modules.get("megavlm.parallel.groups")
    if groups is not None:
        groups.destroy()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
