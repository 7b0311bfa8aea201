"""Rows whose answer is a number of steps, each marked right or wrong: where a step ends in the tokens, and its mark.

As in TRL's PRMTrainer, a separator stands behind every step, and the last token of step and separator speaks for the
step. The answer is printed by the chat template as a whole; where the template trims what is behind the last step, that
step's own last token speaks for it.

Shape suffix: S tokens of one sample.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megavlm.data.sample import Sample
from megavlm.data.token_weights import READ, RIGHT_STEP, WRONG_STEP
from megavlm.errors import UseError, use_error


@dataclass(frozen=True)
class StepRule:
    """How steps are told apart.

    Attributes:
        separator: what stands behind each step.
        last_only: whether only the mark of an answer's last step is learned.
    """

    separator: str = "\n"
    last_only: bool = False


BY_LINES = StepRule()


@dataclass(frozen=True)
class StepEnds:
    """Where the steps of an answer end.

    Attributes:
        answer: its text.
        ends: of each step in it, behind the separator.
        marks: of each step: right, wrong, or None for one that is not learned.
    """

    answer: str
    ends: tuple[int, ...]
    marks: tuple[bool | None, ...]


def with_steps(sample: Sample, rule: StepRule) -> Sample:
    """The row with its steps, each with the separator behind it, as its answer.

    Raises:
        UseError: naming the row: it has no steps, or a step holds the separator.
    """
    try:
        if not sample.steps:
            raise use_error(
                "the row",
                "no steps",
                "`prompt`, `completions` (a list of steps) and `labels` (as many times true or false)",
                "complete it, or choose another stage",
            )
        for number, step in enumerate(sample.steps, 1):
            if rule.separator in step:
                raise use_error(
                    f"step {number}", f"the separator {rule.separator!r} in it", "steps without it",
                    "split the step, or set reward.step_separator",
                )  # fmt: skip
    except UseError as error:
        raise UseError(f"{sample.sample_id}: {error}") from error
    answer = dataclasses.replace(sample.turns[-1], text="".join(step + rule.separator for step in sample.steps))
    return dataclasses.replace(sample, turns=(*sample.turns[:-1], answer))


def step_ends(sample: Sample, rule: StepRule) -> StepEnds:
    """Where the steps of a row of `with_steps` end.

    Raises:
        UseError: something stands for boxes or images in a step, and its text is another by now.
    """
    if sample.turns[-1].text != "".join(step + rule.separator for step in sample.steps):
        raise use_error(
            "a step", "a box or an image in it", "steps of words", "write the box out, or leave the row out"
        )
    ends = itertools.accumulate(len(step) + len(rule.separator) for step in sample.steps)
    learned: Sequence[bool | None] = sample.step_labels
    if rule.last_only:
        learned = (*(None for _ in sample.step_labels[1:]), sample.step_labels[-1])
    return StepEnds(sample.turns[-1].text, tuple(ends), tuple(learned))


def step_classes(text: str, start: int, steps: StepEnds, first_S: np.ndarray, last_S: np.ndarray) -> np.ndarray:
    """The kinds of all tokens of a row: those that speak for a step, and the rest, which is read. int8 [S].

    Args:
        text: that the template has printed.
        start: where the answer begins in it, or white space in front of it.
        steps: of the answer.
        first_S: where each token begins in `text`.
        last_S: where it ends.

    Raises:
        UseError: two steps end in one token, or a step ends in none.
    """
    ends = steps.ends
    if steps.answer in text[start:]:
        start = text.index(steps.answer, start)
    else:  # the template leaves white space around an answer out
        trimmed, left = steps.answer.strip(), len(steps.answer) - len(steps.answer.lstrip())
        start = text.index(trimmed, start)
        ends = tuple(min(end - left, len(trimmed)) for end in ends)
    classes_S = np.full(len(first_S), READ, dtype=np.int8)
    before = -1
    for number, (end, mark) in enumerate(zip(ends, steps.marks, strict=True), 1):
        found = np.flatnonzero((first_S < start + end) & (last_S >= start + end) & (last_S > first_S))
        if not len(found) or found[-1] == before:
            raise use_error(
                f"step {number}", "no token of its own", "a token that its separator ends in",
                "lengthen the step, or set reward.step_separator to a token of the model",
            )  # fmt: skip
        before = found[-1]
        if mark is not None:
            classes_S[before] = RIGHT_STEP if mark else WRONG_STEP
    return classes_S
