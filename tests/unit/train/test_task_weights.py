"""How weights of tasks go on from step to step, and from a checkpoint."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megavlm.config.stage_knobs import SftConfig, TaskWeight
from megavlm.errors import UseError
from megavlm.train.stages.task_weights import LEAST_WEIGHT, WEIGHTINGS, TaskFigures, TaskWeights

NAMES = ("docs", "charts", "ocr")
LEARNING = ("uncertainty", "gradnorm", "loss_ratio")


def made(way: str, **knobs: float) -> TaskWeights:
    return TaskWeights(NAMES, way, WEIGHTINGS[way](NAMES, SftConfig(task_weighting=way, **knobs)))  # type: ignore


def sums(
    losses: list[float], weights: list[float], norms: Sequence[float] = (1.0, 2.0, 0.5)
) -> dict[str, torch.Tensor]:
    """Of a global batch, by its mean losses."""
    means, weights_K = torch.tensor(losses).double(), torch.tensor(weights).double()
    return {"tasks": torch.cat((means * weights_K, weights_K)), "gradient_norms": torch.tensor(list(norms)).double()}


STEPS = [sums([2.0, 4.0, 1.0], [3, 5, 2]), sums([1.5, 4.0, 0.0], [4, 6, 0]), sums([1.0, 3.0, 0.5], [1, 1, 8])]


def run(tasks: TaskWeights, steps: list[dict[str, torch.Tensor]]) -> list[list[float]]:
    factors = []
    for step in steps:
        tasks.take(step, float(step["tasks"][3:].sum()))
        factors.append(tasks.weighting.factors().tolist())
    return factors


def test_fixed() -> None:
    tasks = TaskWeights(NAMES, "fixed", WEIGHTINGS["fixed"](NAMES, SftConfig(task_weights=(TaskWeight("ocr", 0.25),))))
    assert run(tasks, STEPS) == [[1, 1, 0.25]] * 3
    assert not tasks.weighting.offsets().any() and tasks.state() == {}


def test_loss_ratio_by_hand() -> None:
    tasks = made("loss_ratio", task_weight_momentum=0.75, task_weight_temperature=0.5)
    assert tasks.weighting.factors().tolist() == [1, 1, 1]
    first, second, third = run(tasks, STEPS)
    assert first == pytest.approx([1, 1, 1])
    # 0.75 * 2 + 0.25 * 1.5 over 2; unchanged; not seen in this step
    ratios = [0.9375, 1.0, 1.0]
    total = sum(math.exp(2 * ratio) for ratio in ratios)
    assert second == pytest.approx([3 * math.exp(2 * ratio) / total for ratio in ratios])
    ratios = [(0.75 * 1.875 + 0.25) / 2, (3 + 0.75) / 4, 0.75 + 0.125]
    total = sum(math.exp(2 * ratio) for ratio in ratios)
    assert third == pytest.approx([3 * math.exp(2 * ratio) / total for ratio in ratios])


def test_a_task_that_comes_later_counts_as_new() -> None:
    tasks = made("loss_ratio", task_weight_momentum=0.0)
    late = sums([1.0, 2.0, 0.0], [1, 1, 0])
    factors = run(tasks, [late, sums([0.5, 1.0, 7.0], [1, 1, 1]), sums([0.5, 1.0, 3.5], [1, 1, 1])])
    assert factors[1][2] > 1 > factors[1][0] and factors[2] == pytest.approx([1, 1, 1])


def test_uncertainty_follows_torchs_adam_on_the_loss_itself() -> None:
    tasks = made("uncertainty", task_weight_lr=0.1)
    s = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([s], lr=0.1)
    for step in STEPS:
        losses_and_weights = step["tasks"].view(2, 3)
        adam.zero_grad()
        # of every token exp(-s) l + s / 2
        total = (torch.exp(-s) * losses_and_weights[0] + losses_and_weights[1] * s / 2).sum()
        (total / losses_and_weights[1].sum()).backward()
        adam.step()
        (factors,) = run(tasks, [step])
        assert factors == pytest.approx(torch.exp(-s).tolist(), rel=1e-12)
        assert tasks.weighting.offsets().tolist() == pytest.approx((s / 2).tolist(), rel=1e-12)
    assert s.std() > 0.01


def test_uncertainty_comes_to_rest_at_twice_the_loss() -> None:
    tasks = made("uncertainty", task_weight_lr=0.05)
    factors = run(tasks, [sums([2.0, 4.0, 1.0], [3, 5, 2])] * 600)[-1]
    assert factors == pytest.approx([1 / 4, 1 / 8, 1 / 2], rel=1e-3)


def test_gradnorm_makes_norms_alike() -> None:
    """With losses that all fall alike; a step has the norms of its own weights."""
    tasks = made("gradnorm", task_weight_lr=0.01)
    norms = torch.tensor([1.0, 2.0, 0.5]).double()
    for _ in range(500):
        step = sums([2.0, 4.0, 1.0], [3, 5, 2], (norms * tasks.weighting.factors()).tolist())
        (factors,) = run(tasks, [step])
        assert sum(factors) == pytest.approx(3)
    assert (norms * torch.tensor(factors)).tolist() == pytest.approx([6 / 7] * 3, rel=0.05)


def test_gradnorm_pulls_towards_slow_tasks() -> None:
    tasks = made("gradnorm", task_weight_lr=0.01)
    factors = run(tasks, [sums([2.0, 4.0, 1.0], [1, 1, 1], [1.0] * 3), sums([1.0, 4.0, 0.5], [1, 1, 1], [1.0] * 3)])
    assert factors[0] == pytest.approx([1, 1, 1]) and factors[1][1] > 1 > factors[1][0]


def test_gradnorms_weights_stay_above_nothing() -> None:
    tasks = made("gradnorm", task_weight_lr=0.5)
    for _ in range(10):
        factors = run(tasks, [sums([1.0] * 3, [1] * 3, [100.0, 1e-3, 1e-3])])[-1]
        assert min(factors) >= LEAST_WEIGHT / 3


@pytest.mark.parametrize("way", LEARNING)
def test_going_on_from_a_state_is_exact(way: str) -> None:
    whole = run(made(way), STEPS)
    for at in (0, 1, 2):
        before = made(way)
        run(before, STEPS[:at])
        after = made(way)
        after.restore(json.loads(json.dumps(before.state())), Path("checkpoint"))
        assert after.weighting.factors().tolist() == before.weighting.factors().tolist()
        assert run(after, STEPS[at:]) == whole[at:]
    assert whole[-1] != [1, 1, 1]


@pytest.mark.parametrize(
    ("before", "names", "after"),
    [
        ("gradnorm", NAMES, "uncertainty"),
        ("uncertainty", NAMES, "fixed"),
        ("fixed", NAMES, "loss_ratio"),
        ("uncertainty", ("docs", "charts", "photos"), "uncertainty"),
    ],
)
def test_another_way_or_other_tasks_are_refused(before: str, names: tuple[str, ...], after: str) -> None:
    other = TaskWeights(names, before, WEIGHTINGS[before](names, SftConfig()))
    with pytest.raises(UseError, match=r"sft.task_weighting: .* as checkpoint was written"):
        made(after).restore(other.state(), Path("checkpoint"))


def test_factors_that_are_not_learned_may_change_when_resuming() -> None:
    made("fixed").restore(made("none").state(), Path("checkpoint"))


def test_a_task_without_tokens_has_a_weight_and_no_loss() -> None:
    tasks = made("uncertainty")
    figures = tasks.figures_of(STEPS[1], 10.0)
    assert isinstance(figures, TaskFigures) and figures.shares_K.tolist() == pytest.approx([0.4, 0.6, 0])
    log = tasks.log(figures)
    assert log["task/docs/loss"] == 1.5 and "task/ocr/loss" not in log and log["task/ocr/weight"] == 1
