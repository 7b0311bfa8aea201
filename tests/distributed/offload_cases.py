"""What the pool runs for an optimizer in CPU memory: training, and going on, with two memories stood in for."""

from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megavlm.config.schema import Recipe
from megavlm.config.validate import validate_recipe
from megavlm.train import resume
from megavlm.train.state import build_state
from megavlm.train.step import train_step
from tests.stand_ins import host_memory


def train(recipe: Recipe, num_steps: int, save: bool = False) -> dict[str, Any]:
    """Train, from the newest checkpoint of the run folder if there is one.

    Args:
        recipe: of the run.
        num_steps: to take.
        save: write a checkpoint at the end.

    Returns:
        `figures`: (loss, gradient norm) of each step; `host` and `device`: elements whose state is in the host's
        memory, and on the device; `kept`: elements of main weights in the optimizer's state; `types`: of that state.
    """
    validate_recipe(recipe)
    with host_memory.apart():
        state = build_state(recipe)
        resume.resume(state)
        figures = []
        for _ in range(num_steps):
            result = train_step(state, state.step)
            state.step += 1
            figures.append((result.loss, result.norms.total))
        state.loader.close()
        if save:
            resume.save(state)
    optimizers = [inner.optimizer for inner in state.optimizer.chained_optimizers if inner.optimizer is not None]
    kept = [tensors for one in optimizers for tensors in one.state.values()]
    hybrid = [one for one in optimizers if isinstance(one, HybridDeviceOptimizer)]
    return {
        "figures": figures,
        "host": sum(_num_elements(inner) for one in hybrid for inner in one.cpu_optimizers),
        "device": sum(_num_elements(one.gpu_optimizer) for one in hybrid if one.gpu_optimizer is not None),
        "kept": sum(tensors["master_param"].numel() for tensors in kept if "master_param" in tensors),
        "types": {str(tensor.dtype) for one in kept for tensor in one.values() if torch.is_tensor(tensor)},
    }


def _num_elements(optimizer: torch.optim.Optimizer) -> int:
    return sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
