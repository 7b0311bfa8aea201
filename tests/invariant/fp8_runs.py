"""What the pool runs for test_fp8.py."""

from typing import Any

from megavlm.config.schema import Recipe
from megavlm.train import resume
from megavlm.train.state import build_state
from megavlm.train.step import evaluate, train_step
from tests.invariant.measure import StepRow
from tests.invariant.runs import _steps

Histories = dict[str, tuple[float, list[float]]]


def layers_in_fp8(recipe: Recipe) -> dict[str, str]:
    """Kind of scale of the inputs, by the name of every layer of this rank that is in FP8."""
    fp8 = build_state(recipe).parts.fp8
    assert fp8 is not None
    return {name: type(quantisers.inputs).__name__ for name, quantisers in fp8.layers.items()}


def train_with_histories(recipe: Recipe, num_steps: int, evaluates: bool = False) -> tuple[list[StepRow], Histories]:
    """Train from the start; what was measured, and scales and histories after that.

    With `evaluates`, the rows are evaluated too, which must not leave a trace.
    """
    state = build_state(recipe)
    rows = _steps(state, num_steps)
    if evaluates:
        evaluate(state)
    assert state.parts.fp8 is not None
    return rows, state.parts.fp8.state()


def save_and_go_on(recipe: Recipe, num_before: int, num_after: int) -> tuple[list[StepRow], Histories]:
    """Train, save, and train on."""
    state = build_state(recipe)
    _steps(state, num_before)
    resume.save(state)
    assert state.parts.fp8 is not None
    histories = state.parts.fp8.state()
    return _more(state, num_after), histories


def resume_and_go_on(recipe: Recipe, num_steps: int) -> tuple[list[StepRow], Histories]:
    """Go on from the checkpoint: the same."""
    state = build_state(recipe)
    assert resume.resume(state) is not None and state.parts.fp8 is not None
    histories = state.parts.fp8.state()
    return _more(state, num_steps), histories


def _more(state: Any, num_steps: int) -> list[StepRow]:
    rows = []
    for _ in range(num_steps):
        result = train_step(state, state.step)
        state.step += 1
        rows.append(StepRow(result.loss, result.count, result.num_images, {"total": result.norms.total}))
    state.loader.close()
    return rows
