"""What the pool runs for test_evaluation.py and test_text_only.py."""

from megavlm.config.schema import Recipe
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
