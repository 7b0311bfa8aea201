"""What the pool runs for test_layout_free.py."""

from megavlm.config.schema import Recipe
from megavlm.errors import UseError
from megavlm.models.names import component_of
from megavlm.train.state import build_state
from megavlm.train.step import evaluate, train_step


def evaluation(recipe: Recipe) -> dict[str, float]:
    """Evaluate the initial weights."""
    state = build_state(recipe)
    values = evaluate(state)
    again = evaluate(state)
    assert values == again, "an evaluation changes the next one"
    return values


def text_only_steps(recipe: Recipe, num_steps: int) -> tuple[list[float], list[str]]:
    """Losses, and encoder parameters of this rank whose gradient is not there or not zero after the last step."""
    state = build_state(recipe)
    losses = []
    for step in range(num_steps):
        result = train_step(state, step)
        assert result.num_images == 0
        losses.append(result.loss)
    odd = [
        name
        for model in state.models
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and name.startswith(("vision.", "projector."))
        and vars(parameter)["main_grad"].abs().max() != 0
    ]
    return losses, odd


def losses_and_images(recipe: Recipe, num_steps: int) -> list[tuple[float, int]]:
    """(loss, images) of the first steps."""
    state = build_state(recipe)
    results = [train_step(state, step) for step in range(num_steps)]
    return [(result.loss, result.num_images) for result in results]


def build_error(recipe: Recipe) -> str:
    """The `UseError` that building the run raises."""
    try:
        build_state(recipe)
    except UseError as error:
        return str(error)
    raise AssertionError("building raised nothing")


def held_components(recipe: Recipe) -> list[str]:
    """Components that this rank holds parameters of."""
    state = build_state(recipe)
    return sorted({component_of(name) for model in state.models for name, _ in model.named_parameters()})
