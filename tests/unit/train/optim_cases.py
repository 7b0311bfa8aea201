"""What the pool runs for test_optim.py."""

from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from megavlm.config.schema import Recipe
from megavlm.models.names import component_of, named_parameters
from megavlm.train import resume
from megavlm.train.optim import clip_and_update, gradient_norms, learning_rates
from megavlm.train.state import TrainState, build_state
from megavlm.train.step import train_step


def rates_by_step(recipe: Recipe, num_steps: int) -> list[dict[str, float]]:
    """Learning rate of each component with which steps 0 to num_steps - 1 would update."""
    state = build_state(recipe)
    rates = []
    for _ in range(num_steps):
        rates.append(learning_rates(state.scheduler, state.learning, state.learning_components, len(rates)))
        state.scheduler.step(increment=1)
    return rates


def decay_without_gradient(recipe: Recipe) -> dict[str, list[tuple[int, float, float]]]:
    """Update with zero gradients: (dimensions, least, largest ratio of new to old) of parameters, by component."""
    state = build_state(recipe)
    before = {name: parameter.detach().clone() for name, parameter in _parameters(state)}
    _fill_gradients(state, 0.0)
    norms = _prepared_norms(state)
    assert norms.total == 0.0
    clip_and_update(state.optimizer, state.scheduler, state.learning, norms, 0)
    ratios: dict[str, list[tuple[int, float, float]]] = {}
    for name, parameter in _parameters(state):
        old, new = before[name].double(), parameter.detach().double()
        quotient = (new / old)[old.abs() > 1e-3]
        assert len(quotient) > 0 or old.abs().max() <= 1e-3
        if len(quotient):
            triple = (parameter.dim(), float(quotient.min()), float(quotient.max()))
            ratios.setdefault(component_of(name), []).append(triple)
    return ratios


def clipping(recipe: Recipe, gradient: float) -> dict[str, Any]:
    """Give every element the same gradient, update; norms reported, norms expected, and the norm that is left."""
    state = build_state(recipe)
    _fill_gradients(state, gradient)
    norms = _prepared_norms(state)
    sizes: dict[str, int] = {}
    for name, parameter in _parameters(state):
        component = component_of(name)
        sizes[component] = sizes.get(component, 0) + parameter.numel()
    clip_and_update(state.optimizer, state.scheduler, state.learning, norms, 0)
    left = sum(float(vars(p)["main_grad"].double().square().sum()) for _, p in _parameters(state)) ** 0.5
    return {"total": norms.total, "by_component": norms.by_component, "sizes": sizes, "left": left}


def groups_after_steps(recipe: Recipe, num_steps: int) -> tuple[dict[str, Any], dict[str, torch.Tensor], float]:
    """Train, save, and take one more step: (groups, first moments) as saved, and the loss of the further step."""
    state = build_state(recipe)
    for _ in range(num_steps):
        train_step(state, state.step)
        state.step += 1
    resume.save(state)
    groups, moments = _groups(state), _first_moments(state)
    return groups, moments, _loss_after_next_update(state)


def groups_after_resume(recipe: Recipe) -> tuple[dict[str, Any], dict[str, torch.Tensor], float, Path | None]:
    """As `groups_after_steps`, from the checkpoint."""
    state = build_state(recipe)
    folder = resume.resume(state)
    groups, moments = _groups(state), _first_moments(state)
    return groups, moments, _loss_after_next_update(state), folder


def _loss_after_next_update(state: TrainState) -> float:
    train_step(state, state.step)
    return train_step(state, state.step + 1).loss


def _groups(state: TrainState) -> dict[str, Any]:
    """Settings of each parameter group by its tags; `lr`, as its next step uses it."""
    keys = ("lr", "max_lr", "min_lr", "weight_decay", "step")
    return {
        f"{group['lr_mult']:g} {group['wd_mult']:g}": {key: group[key] for key in keys if key in group}
        for group in state.optimizer.param_groups
    }


def _first_moments(state: TrainState) -> dict[str, torch.Tensor]:
    """Adam's first moments by name. Only without the distributed optimizer are they whole."""
    return {
        name: inner.optimizer.state[parameter]["exp_avg"].clone()
        for inner in state.optimizer.chained_optimizers
        for name, parameter in _parameters(state)
        if parameter in inner.optimizer.state
    }


def _parameters(state: TrainState) -> list[tuple[str, torch.nn.Parameter]]:
    return [pair for model in state.models for pair in named_parameters(model)]


def _fill_gradients(state: TrainState, value: float) -> None:
    chunk: DistributedDataParallel
    for chunk in state.parts.wrapped:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    for _, parameter in _parameters(state):
        vars(parameter)["main_grad"].fill_(value)


def _prepared_norms(state: TrainState) -> Any:
    state.optimizer.prepare_grads()
    return gradient_norms(state.optimizer, state.parts, state.learning, state.learning_components)
