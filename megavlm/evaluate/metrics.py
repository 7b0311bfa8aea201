"""Scores of answers against truths."""

from collections.abc import Sequence


def exact_match(answers: Sequence[str], truths: Sequence[str]) -> float:
    """Share of answers that equal their truth, white space at the ends aside; NaN for none."""
    if not truths:
        return float("nan")
    right = sum(answer.strip() == truth.strip() for answer, truth in zip(answers, truths, strict=True))
    return right / len(truths)


def exact_match_by_task(answers: Sequence[str], truths: Sequence[str], tasks: Sequence[str]) -> dict[str, float]:
    """`exact_match` of each task."""
    scores = {}
    for task in sorted(set(tasks)):
        picked = [number for number, name in enumerate(tasks) if name == task]
        scores[task] = exact_match([answers[n] for n in picked], [truths[n] for n in picked])
    return scores
