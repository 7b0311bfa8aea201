"""What the pool runs for test_native.py."""

import contextlib
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megavlm.checkpoint import writing
from megavlm.config.schema import Recipe
from megavlm.errors import RunError, UseError
from megavlm.train import resume
from megavlm.train.state import TrainState, build_state
from megavlm.train.step import train_step

Held = tuple[torch.Tensor, torch.Tensor, int | None]


def save_steps(recipe: Recipe, steps: list[int]) -> list[Path]:
    """Save a checkpoint for each of some step numbers; the first weights tell them apart (see `first_weight`)."""
    state = build_state(recipe)
    return [_save(state, step) for step in steps]


def save_trained(recipe: Recipe) -> dict[str, Held]:
    """Train a step, save it; this rank's part of every parameter of the encoder."""
    state = build_state(recipe)
    train_step(state, 0)
    state.step = 1
    resume.save(state)
    return _held(state)


def resume_held(recipe: Recipe) -> dict[str, Held]:
    """Resume; this rank's part of every parameter of the encoder."""
    state = build_state(recipe)
    assert resume.resume(state) is not None
    return _held(state)


def _held(state: TrainState) -> dict[str, Held]:
    """Parameter and first moment, and the dimension that tensor parallelism cuts, None where it cuts none."""
    moments: dict[torch.nn.Parameter, torch.Tensor] = {}
    for inner in state.optimizer.chained_optimizers:
        moments |= {parameter: entry["exp_avg"] for parameter, entry in inner.optimizer.state.items()}
    found: dict[str, Held] = {}
    for name, parameter in state.parts.encoder.named_parameters():
        marks = vars(parameter)
        cut = marks["partition_dim"] if marks.get("tensor_model_parallel", False) else None
        found[name] = (parameter.detach(), moments[parameter], cut)
    return found


def resume_weight(recipe: Recipe) -> tuple[Path | None, int, float | None]:
    """Resume: (folder, step, the number that `save_steps` wrote into the weights)."""
    state = build_state(recipe)
    folder = resume.resume(state)
    return folder, state.step, _mark(state) if folder else None


def resume_error(recipe: Recipe) -> str:
    """The `UseError` that resuming raises."""
    state = build_state(recipe)
    try:
        resume.resume(state)
    except UseError as error:
        return str(error)
    raise AssertionError("resuming raised nothing")


def load_error(recipe: Recipe) -> str:
    """The `RunError` that resuming raises."""
    state = build_state(recipe)
    try:
        resume.resume(state)
    except RunError as error:
        return str(error)
    raise AssertionError("resuming raised nothing")


def save_killed(recipe: Recipe, step: int) -> None:
    """Die without warning when the files are written, but not yet renamed."""
    state = build_state(recipe)

    def die(*_arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    writing._finish = die
    _save(state, step)


def save_while_training(recipe: Recipe, step: int) -> tuple[bool, float, float]:
    """Save, change the weights before the files are complete; (whether they were, first weight then and there)."""
    state = build_state(recipe)
    train_step(state, 0)
    _mark_weights(state, step)
    state.step = step
    pending = resume.begin_save(state, copy=True)
    folder_was_there = writing.step_folder(resume.checkpoint_root(state), step).exists()
    train_step(state, 1)
    _mark_weights(state, 77)
    pending.finish()
    again = build_state(recipe)
    resume.resume(again)
    return folder_was_there, _mark(again), _mark(state)


def moments_of_a_save_while_training(recipe: Recipe) -> tuple[float, float]:
    """Largest difference of the resumed optimizer's moments from those when the save began, and from the later ones."""
    state = build_state(recipe)
    train_step(state, 0)
    state.step = 1
    before = _moments(state)
    pending = resume.begin_save(state, copy=True)
    train_step(state, 1)
    pending.finish()
    again = build_state(recipe)
    resume.resume(again)
    found, later = _moments(again), _moments(state)
    return (found - before).abs().max().item(), (found - later).abs().max().item()


def _moments(state: TrainState) -> torch.Tensor:
    return torch.cat(
        [
            entry["exp_avg"].flatten()
            for inner in state.optimizer.chained_optimizers
            for entry in inner.optimizer.state.values()
        ]
    )


def begun_on_full_disk(recipe: Recipe, step: int, max_file_bytes: int) -> str:
    """The `RunError` with which a save ends that was begun, and then ran out of space."""
    state = build_state(recipe)
    train_step(state, 0)
    state.step = step
    with _small_files(max_file_bytes):
        pending = resume.begin_save(state, copy=True)
        while not pending.is_written:
            time.sleep(0.01)
    try:
        pending.finish()
    except RunError as error:
        return str(error)
    raise AssertionError("finishing raised nothing")


def save_evaluated(recipe: Recipe, losses: dict[int, float]) -> None:
    """Save a checkpoint for each of some steps, evaluated to a loss; NaN: not evaluated."""
    state = build_state(recipe)
    for step, loss in losses.items():
        state.evaluation = None if loss != loss else (step, loss)
        _save(state, step)


def save_on_full_disk(recipe: Recipe, step: int, max_file_bytes: int) -> str:
    """The `RunError` of a save while no file may grow beyond a size, as on a disk that fills up."""
    state = build_state(recipe)
    with _small_files(max_file_bytes):
        try:
            _save(state, step)
        except RunError as error:
            return str(error)
    raise AssertionError("saving raised nothing")


def save_again_after_error(recipe: Recipe, step: int, max_file_bytes: int) -> Path:
    """After a failed save the same process goes on, and the next save succeeds."""
    state = build_state(recipe)
    with _small_files(max_file_bytes), contextlib.suppress(RunError):
        _save(state, step)
    train_step(state, 0)
    return _save(state, step + 1)


def _save(state: TrainState, step: int) -> Path:
    if not state.step:
        train_step(state, 0)  # the optimizer has no state before its first step
    state.step = step
    _mark_weights(state, step)
    return resume.save(state)


def _mark_weights(state: TrainState, number: int) -> None:
    with torch.no_grad():
        for model in state.models:
            for parameter in model.parameters():
                parameter.flatten()[0] = float(number)


def _mark(state: TrainState) -> float:
    numbers = {float(p.flatten()[0]) for model in state.models for p in model.parameters()}
    assert len(numbers) == 1, "weights of several checkpoints"
    return numbers.pop()


@contextlib.contextmanager
def _small_files(max_bytes: int) -> Iterator[None]:
    """Writes beyond the limit fail with EFBIG (Python ignores the signal), also in processes started meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    dist.barrier()
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
