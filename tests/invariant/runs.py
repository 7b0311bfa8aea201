"""What the pool runs: training, its first gradients, and saving and resuming, under the layout of a recipe."""

import dataclasses
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from megavlm.config.schema import Recipe
from megavlm.config.validate import validate_recipe
from megavlm.models.encoder import VisionEncoder
from megavlm.models.names import Part, named_parameters
from megavlm.parallel.wrap import OVERLAP_BUCKET_PARAMETERS
from megavlm.train import resume
from megavlm.train.references import keeps_references, reference_logprobs
from megavlm.train.state import TrainState, build_state
from megavlm.train.step import train_step
from tests.invariant.measure import StepRow


def train(recipe: Recipe, num_steps: int, bucket_size: int | None = None) -> list[StepRow]:
    """Train from the start."""
    return _steps(_build(recipe, bucket_size), num_steps)


def train_broken(recipe: Recipe, num_steps: int, mistake: str) -> list[StepRow]:
    """Train with one thing made wrong."""
    from megavlm.models import experts

    real = experts.load_balancing_sum

    def broken(logits_TE: torch.Tensor, chosen_TE: torch.Tensor, real_T: torch.Tensor, *rest: Any) -> torch.Tensor:
        if mistake == "balance counts padding":
            return real(logits_TE, chosen_TE, torch.ones_like(real_T), *rest)
        share = {"balance times local tokens": 1 / rest[1].size(), "balance not there": 0.0}[mistake]
        return share * real(logits_TE, chosen_TE, real_T, *rest)

    with patch.object(experts, "load_balancing_sum", broken):
        return _steps(_build(recipe), num_steps)


def train_with_local_context_gradients(recipe: Recipe, num_steps: int) -> list[StepRow]:
    """Train with a mistake: each context rank keeps the gradient of its own share of a sequence's sum."""
    from megavlm.parallel import context

    with patch.object(context._SummedOverContext, "backward", staticmethod(lambda _ctx, grad: (grad, None))):
        return _steps(_build(recipe), num_steps)


def train_with_broken_adapters(recipe: Recipe, num_steps: int, mistake: str) -> list[StepRow]:
    """Train with one thing about adapters made wrong."""
    from megavlm.peft import lora, splits

    def unmarked(self: Any, modules: torch.nn.Module, lies: Any) -> None:
        mark(self, modules, lies)
        for parameter in modules.parameters():
            vars(parameter)["sequence_parallel"] = False

    def own_seed(seed: int, name: str) -> int:
        return seed_of(seed + dist.get_rank(), name)

    mark, seed_of = splits.Splits.mark, lora.seed_of
    changed = {
        "gradient of A not summed, TP": patch.object(lora, "copy_to_tensor_model_parallel_region", lambda x, group: x),
        "gradients not summed, SP": patch.object(splits.Splits, "mark", unmarked),
        "A drawn by each rank for itself": patch.object(lora, "seed_of", own_seed),
    }[mistake]
    with changed:
        return _steps(_build(recipe), num_steps)


def train_with_broken_schedules(recipe: Recipe, num_steps: int, mistake: str) -> list[StepRow]:
    """Train with one thing about rates, times and limits of layers made wrong."""
    from megavlm.train import learning, optim, step

    def local_names(part: Part) -> Any:
        return part.named_parameters()

    def own_norms(*arguments: Any) -> Any:
        with patch.object(dist, "all_reduce"):
            own = norms_of(*arguments)
        return dataclasses.replace(norms_of(*arguments), by_unit=own.by_unit)

    norms_of = optim.gradient_norms
    changed = {
        "layers counted on each rank": patch.object(learning, "named_parameters", local_names),
        "norms of a rank's own part": patch.object(step, "gradient_norms", own_norms),
        "frozen gradients counted": patch.object(step, "hide_gradients", lambda *_: None),
    }[mistake]
    with changed:
        return _steps(_build(recipe), num_steps)


def train_and_save(recipe: Recipe, num_steps: int, num_steps_beside: int = 0) -> list[StepRow]:
    """Train from the start, and write a checkpoint into the recipe's run folder; rows of the steps before it.

    With `num_steps_beside`, so many steps more are taken while it is written.
    """
    state = _build(recipe)
    rows = _steps(state, num_steps)
    pending = resume.begin_save(state, copy=num_steps_beside > 0)
    for step in range(num_steps, num_steps + num_steps_beside):
        train_step(state, step)
    pending.finish()
    return rows


def resume_and_train(recipe: Recipe, num_steps: int) -> list[StepRow]:
    """Go on from the checkpoint in the recipe's run folder."""
    state = _build(recipe)
    assert resume.resume(state) is not None, "no checkpoint was found"
    return _steps(state, num_steps)


def first_gradients(recipe: Recipe) -> dict[str, torch.Tensor]:
    """Whole gradients of the first step by global parameter name, of the parameters that this rank has a part of.

    The recipe must not use the distributed optimizer: it leaves a rank with its own part of the reduced gradients.
    """
    assert not recipe.parallel.use_distributed_optimizer and recipe.optimizer.clip_grad == 0
    state = _build(recipe)
    train_step(state, 0)
    return {
        name: gradient
        for model in state.models
        for name, parameter in named_parameters(model)
        if (gradient := _whole_gradient(state, model, name, parameter)) is not None
    }


def num_trainable(recipe: Recipe) -> int:
    """Parameters that this rank trains."""
    state = _build(recipe)
    return sum(p.numel() for model in state.models for p in model.parameters() if p.requires_grad)


def num_buckets(recipe: Recipe, bucket_size: int) -> int:
    """Gradient buckets of this rank."""
    state = _build(recipe, bucket_size)
    return sum(len(buffer.buckets) for chunk in state.parts.chunks for buffer in chunk.buffers)


def _build(recipe: Recipe, bucket_size: int | None = None) -> TrainState:
    validate_recipe(recipe)
    state = build_state(recipe, bucket_size or OVERLAP_BUCKET_PARAMETERS)
    if keeps_references(recipe):  # computed under this layout, not taken from another's run folder
        state.train_set.references = reference_logprobs(state, state.train_set)
    return state


def _steps(state: TrainState, num_steps: int) -> list[StepRow]:
    rows = []
    for _ in range(num_steps):
        result = train_step(state, state.step)
        state.step += 1
        norms = {"total": result.norms.total} | result.norms.by_component
        rows.append(StepRow(result.loss, result.count, result.num_images, norms, result.figures))
    state.loader.close()
    return rows


def _whole_gradient(state: TrainState, model: Part, name: str, parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """Put the parts of tensor-parallel ranks together; None for what is not trained."""
    if not parameter.requires_grad:
        return None
    marks = vars(parameter)
    gradient = marks["main_grad"].clone()
    group = state.groups.vision.tp if isinstance(model, VisionEncoder) else state.groups.tensor
    if not marks.get("tensor_model_parallel", False) or group.size() == 1:
        return gradient
    parts = [torch.empty_like(gradient) for _ in range(group.size())]
    dist.all_gather(parts, gradient.contiguous(), group=group)
    halves = {entry.native: entry.halves for entry in state.directory.entries}
    if not halves.get(name, False):
        return torch.cat(parts, marks["partition_dim"])
    gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
    return torch.cat([*gates, *ups])
