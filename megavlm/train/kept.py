"""Which of a round's answers are learned: by reward, of each question the best.

Source: RAFT, Dong et al., arXiv 2304.06767, algorithm 1 (the best of n answers, n - 1 of which are dropped); ReST,
Gulcehre et al., arXiv 2308.08998, section 3 (all answers whose reward reaches a threshold).
"""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megavlm.config.iterate import IterateConfig
from megavlm.data.messages import ANSWER_ROLES
from megavlm.data.sample import Sample, Turn


@dataclass(frozen=True)
class Answered:
    """A question of a round, and the answers to it.

    Attributes:
        row: number of the training row, of those that are left.
        answers: their texts; None for one that has not ended, or says nothing.
        rewards: of each; None where there is none.
    """

    row: int
    answers: tuple[str | None, ...]
    rewards: tuple[float | None, ...] = ()


def truth_of(sample: Sample) -> str:
    """The row's own answer."""
    return sample.turns[-1].text


def with_answer(sample: Sample, answer: str) -> Sample:
    """The row with another answer to its last question."""
    turns = sample.turns
    while turns[-1].role in ANSWER_ROLES:
        turns = turns[:-1]
    return dataclasses.replace(sample, turns=(*turns, Turn("assistant", answer)))


def exact_rewards(sample: Sample, answers: Sequence[str | None]) -> tuple[float | None, ...]:
    """1 for the row's own answer, white space around it aside, else 0."""
    truth = truth_of(sample).strip()
    return tuple(None if answer is None else float(answer.strip() == truth) for answer in answers)


def kept_answers(answered: Answered, knobs: IterateConfig) -> list[tuple[str, float]]:
    """What is learned of the answers to a question: each text once, the highest reward first; with their rewards."""
    best: dict[str, float] = {}
    for answer, reward in zip(answered.answers, answered.rewards, strict=True):
        if answer is not None and reward is not None and reward >= knobs.threshold:
            best[answer] = max(reward, best.get(answer, reward))
    ranked = sorted(best.items(), key=lambda pair: -pair[1])
    return ranked[: knobs.num_kept or None]


def summary_of(answered: Sequence[Answered], kept: Sequence[Sequence[tuple[str, float]]]) -> dict[str, Any]:
    """Counts and rewards of a round.

    Args:
        answered: all questions with their answers.
        kept: of each question what is learned.
    """
    rewards = [reward for one in answered for reward in one.rewards if reward is not None]
    learned = [reward for one in kept for _text, reward in one]
    return {
        "questions": len(answered),
        "answers": sum(len(one.answers) for one in answered),
        "unfinished": sum(answer is None for one in answered for answer in one.answers),
        "kept": len(learned),
        "questions_with_kept": sum(bool(one) for one in kept),
        "mean_reward": statistics.fmean(rewards) if rewards else None,
        "mean_kept_reward": statistics.fmean(learned) if learned else None,
    }
