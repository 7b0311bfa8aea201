"""What the pool runs for test_native.py."""

import contextlib
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megavlm.checkpoint import native
from megavlm.config.schema import Recipe
from megavlm.errors import RunError, UseError
from megavlm.train import resume
from megavlm.train.state import TrainState, build_state
from megavlm.train.step import train_step


def save_steps(recipe: Recipe, steps: list[int]) -> list[Path]:
    """Save a checkpoint for each of some step numbers; the first weights tell them apart (see `first_weight`)."""
    state = build_state(recipe)
    return [_save(state, step) for step in steps]


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

    native._finish = die
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
    with torch.no_grad():
        for model in state.models:
            for parameter in model.parameters():
                parameter.flatten()[0] = float(step)
    return resume.save(state)


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
