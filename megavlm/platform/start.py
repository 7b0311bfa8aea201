"""What every entry point that trains or loads a model does first: choose the platform."""

import os

import torch

from megavlm.platform import cpu, log


def start() -> str:
    """Set up logging, and the CPU adapter or this rank's CUDA device. Call before anything imports megatron.

    Returns:
        `cpu` or `cuda`.
    """
    log.configure()
    if cpu.install():
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads_per_process(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        return "cpu"
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return "cuda"


def threads_per_process(num_processes: int) -> int:
    """Threads for each of some processes that share this machine's cores."""
    return max(1, len(os.sched_getaffinity(0)) // num_processes)
