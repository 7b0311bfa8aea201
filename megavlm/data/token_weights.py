"""What kind of token is learned how much, and when: kinds are found once, weights depend on the step.

Shape suffix: S tokens of one sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megavlm.config.schema import DataConfig, TokenWeights

# Kinds of tokens, as they are kept with a sample.
READ, SPECIAL, INSTRUCTION, RESPONSE, BOX, ENTITY, RIGHT_STEP, WRONG_STEP = range(8)

DEFAULT_WEIGHTS = TokenWeights()
"""Answers only."""


def loss_weights(classes_S: np.ndarray, scales_S: np.ndarray, weights: TokenWeights = DEFAULT_WEIGHTS) -> np.ndarray:
    """The weight of predicting each token: float32 [S]; of a token that speaks for a wrong step, minus its weight.

    Args:
        classes_S: int8, kinds of tokens.
        scales_S: float32, what a turn and its row multiply the weight by.
        weights: of the kinds.
    """
    table = np.zeros(8, dtype=np.float32)
    table[SPECIAL], table[INSTRUCTION], table[RESPONSE] = weights.special, weights.instruction, weights.response
    table[BOX], table[ENTITY] = weights.response + weights.box, weights.response + weights.entity
    table[RIGHT_STEP], table[WRONG_STEP] = 1, -1
    product_S: np.ndarray = table[classes_S] * scales_S
    return product_S


@dataclass(frozen=True)
class TokenSchedule:
    """Weights over a training: phases of (share of its steps at which the phase starts, weights), ascending from 0."""

    phases: tuple[tuple[float, TokenWeights], ...] = ((0.0, DEFAULT_WEIGHTS),)

    def at(self, step: int, total_steps: int) -> TokenWeights:
        """Weights of a step (from 0) of `total_steps`."""
        started = [weights for start, weights in self.phases if step >= start * total_steps]
        return started[-1]

    @property
    def last(self) -> TokenWeights:
        """What training ends with; held-out rows are judged by it throughout, so that their losses compare."""
        return self.phases[-1][1]

    @property
    def all(self) -> Sequence[TokenWeights]:
        """The weights of every phase."""
        return [weights for _, weights in self.phases]

    @property
    def reads_prompts(self) -> bool:
        """Whether what is not an answer is learned at some time, so that its kinds have to be told apart."""
        return any(weights.special or weights.instruction for weights in self.all)


DEFAULT_SCHEDULE = TokenSchedule()


def token_schedule(data: DataConfig) -> TokenSchedule:
    """The schedule of a recipe."""
    if not data.token_weight_schedule:
        return TokenSchedule(((0.0, data.token_weights),))
    phases = []
    for phase in data.token_weight_schedule:
        values = {name: value for name, value in vars(phase).items() if name != "from_progress"}
        phases.append((phase.from_progress, TokenWeights(**values)))
    return TokenSchedule(tuple(phases))
