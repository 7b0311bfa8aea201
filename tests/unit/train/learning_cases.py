"""What the pool runs for test_learning.py."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megavlm.checkpoint.hf_load import tied_name
from megavlm.config.schema import Recipe
from megavlm.config.validate import validate_recipe
from megavlm.models.encoder import VisionEncoder
from megavlm.models.names import named_parameters, stacked_name
from megavlm.train import resume
from megavlm.train.learning import hide_gradients
from megavlm.train.loss_scale import prepare_gradients
from megavlm.train.optim import gradient_norms, learning_rates
from megavlm.train.state import TrainState, build_state
from megavlm.train.step import train_step


def settings_by_name(recipe: Recipe) -> dict[str, tuple[float, float, int, str]]:
    """(peak rate, least rate, first step, unit of clipping) of every parameter of this rank in its optimizer."""
    state = _build(recipe)
    group_of = {
        parameter: (group["max_lr"], group["min_lr"], own.first_step, own.unit)
        for group in state.optimizer.param_groups
        for own in [state.learning.tagged(group["lr_mult"])]
        for parameter in group["params"]
    }
    state.loader.close()
    return {name: group_of[parameter] for name, parameter in _parameters(state)}


def rates_by_step(recipe: Recipe, num_steps: int) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Of each step: what the log says, and the largest rate that the update of a component's groups was made with."""
    state = _build(recipe)
    found = []
    for step in range(num_steps):
        said = learning_rates(state.scheduler, state.learning, state.learning_components, step)
        seen: dict[str, float] = {}
        step_of = state.optimizer.step_with_ready_grads

        def look(seen: dict[str, float] = seen, step_of: Any = step_of) -> bool:
            held = [inner.optimizer for inner in state.optimizer.chained_optimizers]
            for group in (group for one in held for group in one.param_groups):
                name = state.learning.tagged(group["lr_mult"]).component
                if group["params"]:
                    seen[name] = max(seen.get(name, 0.0), group["lr"])
            return bool(step_of())

        vars(state.optimizer)["step_with_ready_grads"] = look
        train_step(state, step)
        del vars(state.optimizer)["step_with_ready_grads"]
        found.append((said, seen))
    state.loader.close()
    return found


def history(recipe: Recipe, num_steps: int) -> list[dict[str, dict[str, Any]]]:
    """After every step, by parameter: a digest of its bits, Adam's number of steps, and the size of its update.

    `update` is the median of |new - old| over the rate; None where nothing has changed, or there is no rate.
    """
    state = _build(recipe)
    rows = []
    for _ in range(num_steps):
        before = {name: parameter.detach().clone() for name, parameter in _parameters(state)}
        rates = {one: group["lr"] for group in state.optimizer.param_groups for one in group["params"]}
        train_step(state, state.step)
        state.step += 1
        rows.append({name: _seen(state, name, parameter, before, rates) for name, parameter in _parameters(state)})
    state.loader.close()
    return rows


def _seen(
    state: TrainState,
    name: str,
    parameter: torch.nn.Parameter,
    before: dict[str, torch.Tensor],
    rates: dict[torch.nn.Parameter, float],
) -> dict[str, Any]:
    change = (parameter.detach() - before[name]).abs()
    (group,) = (group for group in state.optimizer.param_groups if any(one is parameter for one in group["params"]))
    held = [inner.optimizer.state for inner in state.optimizer.chained_optimizers if parameter in inner.optimizer.state]
    return {
        "digest": hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest(),
        "steps": group.get("step", 0),
        "has_moments": bool(held) and bool(held[0][parameter]),
        "update": float(change[change > 0].median()) / rates[parameter] if change.any() else None,
    }


def norms_of_constant(recipe: Recipe, gradient: float, step: int) -> dict[str, Any]:
    """Give every element the same gradient: norms in a step, and the elements of each unit that learns by then."""
    state = _build(recipe)
    for chunk in state.parts.wrapped:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    sizes: dict[str, int] = {}
    for _, parameter in _parameters(state):
        vars(parameter)["main_grad"].fill_(gradient)
        group = state.learning.of[parameter]
        if group.first_step <= step:
            sizes[group.unit] = sizes.get(group.unit, 0) + parameter.numel()
    hide_gradients(state.learning, step)
    state.optimizer.prepare_grads()
    norms = gradient_norms(state.optimizer, state.parts, state.learning, state.learning_components)
    state.loader.close()
    return {"total": norms.total, "by_component": norms.by_component, "by_unit": norms.by_unit, "sizes": sizes}


def overflow_before_its_time(recipe: Recipe) -> list[bool]:
    """An infinite gradient in the tower: whether the first step, and the third, have to be skipped."""
    state = _build(recipe)
    skips = []
    for step in (0, 2):
        for chunk in state.parts.wrapped:
            chunk.zero_grad_buffer()
        state.optimizer.zero_grad()
        (encoder,) = (model for model in state.models if isinstance(model, VisionEncoder))
        vars(next(encoder.vision.parameters()))["main_grad"].view(-1)[0] = torch.inf
        hide_gradients(state.learning, step)
        skips.append(prepare_gradients(state.optimizer))
    state.loader.close()
    return skips


def save_after(recipe: Recipe, num_steps: int) -> None:
    """Train, and write a checkpoint."""
    state = _build(recipe)
    for _ in range(num_steps):
        train_step(state, state.step)
        state.step += 1
    resume.save(state)
    state.loader.close()


def steps_after_resume(recipe: Recipe) -> dict[str, int]:
    """Adam's number of steps of every parameter, as loaded."""
    state = _build(recipe)
    assert resume.resume(state) is not None
    state.loader.close()
    return {
        name: group["step"]
        for name, parameter in _parameters(state)
        for group in state.optimizer.param_groups
        if any(one is parameter for one in group["params"])
    }


def updates_against(recipe: Recipe, num_steps: int, start: Path, end: Path) -> dict[str, float]:
    """Train, and compare each parameter's whole update with that between two files of transformers' weights.

    Returns:
        |ours - theirs| / |theirs| by parameter, beyond half a unit in the last place of the weight for each step, to
        which fp32 rounds it; what neither side has changed is left out.
    """
    state = _build(recipe)
    for _ in range(num_steps):
        train_step(state, state.step)
        state.step += 1
    state.loader.close()
    by_native = {entry.native: entry for entry in state.directory.entries}
    memory = state.directory.family.memory_name
    before, after = load_file(start), load_file(end)
    distances = {}
    for model in state.models:
        for name, parameter in named_parameters(model):
            if not parameter.requires_grad:
                continue
            entry = by_native[stacked_name(tied_name(name, model))[0]]
            old, new = (entry.to_native([file[memory(part)] for part in entry.names]) for file in (before, after))
            theirs, ours = new - old, parameter.detach() - old
            if theirs.any() or ours.any():
                rounding = num_steps * torch.finfo(torch.float32).eps / 2 * new.abs()
                distances[name] = float(((ours - theirs).abs() - rounding).clamp(min=0).norm() / theirs.norm())
    return distances


def _build(recipe: Recipe) -> TrainState:
    validate_recipe(recipe)
    return build_state(recipe)


def _parameters(state: TrainState) -> list[tuple[str, torch.nn.Parameter]]:
    return [pair for model in state.models for pair in named_parameters(model)]
