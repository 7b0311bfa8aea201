"""What the pool runs for test_loss_scale.py."""

from typing import Any

import torch

from megavlm.config.schema import Recipe
from megavlm.config.validate import validate_recipe
from megavlm.models.encoder import VisionEncoder
from megavlm.train import resume
from megavlm.train.loss_scale import prepare_gradients, scaler_of
from megavlm.train.state import TrainState, build_state
from megavlm.train.step import train_step

Row = tuple[float, float, float | None, bool]


def train(recipe: Recipe, num_steps: int, saves: bool = False, resumes: bool = False) -> list[Row]:
    """(loss, gradient norm, loss scale, skipped) of each step; `resumes` from the run folder, `saves` at the end."""
    validate_recipe(recipe)
    state = build_state(recipe)
    if resumes:
        assert resume.resume(state) is not None
    rows = []
    for _ in range(num_steps):
        result = train_step(state, state.step)
        state.step += 1
        rows.append((result.loss, result.norms.total, result.loss_scale, result.skipped))
    if saves:
        resume.save(state)
    state.loader.close()
    return rows


def num_updates(recipe: Recipe, num_steps: int) -> tuple[set[int], int]:
    """Adam's count of updates in every group after some steps, and the steps that were skipped."""
    state = build_state(recipe)
    for _ in range(num_steps):
        train_step(state, state.step)
        state.step += 1
    state.loader.close()
    return _updates(state), state.num_skipped


def num_updates_after_resume(recipe: Recipe) -> tuple[set[int], int]:
    """The same right after a resume."""
    state = build_state(recipe)
    assert resume.resume(state) is not None
    state.loader.close()
    return _updates(state), state.num_skipped


def _updates(state: TrainState) -> set[int]:
    return {
        group["step"]
        for inner in state.optimizer.chained_optimizers
        if inner.optimizer is not None
        for group in inner.optimizer.param_groups
    }


def overflow_in_encoder(recipe: Recipe, on_rank: int) -> dict[str, Any]:
    """One infinite gradient in the encoder of one rank: what each rank decides, and its scales after that."""
    state = build_state(recipe)
    for chunk in state.parts.wrapped:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    if torch.distributed.get_rank() == on_rank:
        (encoder,) = (model for model in state.models if isinstance(model, VisionEncoder))
        vars(next(encoder.parameters()))["main_grad"].view(-1)[0] = torch.inf
    skips = prepare_gradients(state.optimizer)
    scales = [float(inner.get_loss_scale()) for inner in state.optimizer.chained_optimizers]
    state.loader.close()
    scaler = scaler_of(state.optimizer)
    assert scaler is not None
    return {"skips": skips, "scales": scales}
