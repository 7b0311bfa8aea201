"""What the pool runs for an optimizer in CPU memory: training, and going on, with two memories stood in for."""

from dataclasses import dataclass

import torch

from megavlm.config.schema import Recipe
from megavlm.config.validate import validate_recipe
from megavlm.train import resume
from megavlm.train.state import build_state
from megavlm.train.step import train_step
from tests.stand_ins import host_memory


@dataclass(frozen=True)
class Trained:
    """A run of a rank.

    Attributes:
        figures: (loss, gradient norm) of each step.
        host: elements whose state is in the host's memory.
        device: those whose state is on the device.
        kept: elements of main weights in the optimizer's state.
        types: of the state.
    """

    figures: list[tuple[float, float]]
    host: int
    device: int
    kept: int
    types: set[str]


def train(recipe: Recipe, num_steps: int, save: bool = False) -> Trained:
    """Train, from the newest checkpoint of the run folder if there is one; `save`: write one at the end."""
    validate_recipe(recipe)
    with host_memory.apart() as counted:
        state = build_state(recipe)
        built = dict(counted)
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
    main = [tensors["master_param"] for tensors in kept if "master_param" in tensors]
    return Trained(
        figures,
        built["host"],
        built["device"],
        sum(tensor.numel() for tensor in main),
        {str(tensor.dtype) for one in kept for tensor in one.values() if torch.is_tensor(tensor)},
    )
