"""What the pool runs for test_pieces.py."""

from megavlm.config.schema import Recipe
from megavlm.train.answers import answer, report_samples
from megavlm.train.state import build_state
from megavlm.train.step import evaluate


def answers_and_evaluation(recipe: Recipe) -> tuple[list[str], float]:
    """Greedy answers to the held-out rows, and their loss."""
    state = build_state(recipe)
    found = answer(state, report_samples(state)), evaluate(state)["loss"]
    state.loader.close()
    return found
