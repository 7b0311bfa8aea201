"""Weights of tasks and the loss of boxes against their formulae in plain torch on transformers' model.

Shape suffixes: S tokens of a sample, Y vocabulary, B boxes, K tasks.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from tests.invariant import canon
from tests.parity import objective_cases as cases
from tests.parity.reference import Reference, amplify_vision, load_reference, model_inputs
from tests.parity.rows import Item
from tests.pool import PoolKeeper
from tests.tiny_boxes import write_tiny_boxes

# Of the loss, and of every parameter's gradient by norms; fp32.
RELATIVE = 1e-5
LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "TP2+SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "CP2": {"context_parallel_size": 2, "cp_comm_type": "p2p"},
}
BOX_COEFFICIENT = 0.7


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and rows with boxes of two tasks of unlike length."""
    folder = tmp_path_factory.mktemp("objectives")
    amplify_vision(write_tiny_boxes(folder / "model"))
    canon.write_rows(folder)
    rows = (folder / "boxes.jsonl").read_text().splitlines()
    (folder / "one.jsonl").write_text("\n".join(rows[:3]) + "\n")
    (folder / "two.jsonl").write_text("\n".join(rows[7:12]) + "\n")
    return folder


@dataclass
class Parts:
    """Of a global batch, differentiable: sums of losses and of weights by task, and of each box its L1 and 1 - GIoU."""

    losses_K: torch.Tensor
    weights_K: torch.Tensor
    l1_B: torch.Tensor
    giou_B: torch.Tensor


def boxes_of(logits_SY: torch.Tensor, tokens: list[int], tokenizer: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(expected, labelled) corners of the boxes between markers, from what predicts each of their tokens."""
    vocabulary = tokenizer.get_vocab()
    bins = torch.tensor([vocabulary[f"<|{number}|>"] for number in range(1000)])
    places = torch.arange(1000) / 999
    start, end = vocabulary["<|box_start|>"], vocabulary["<|box_end|>"]
    found = []
    for at in range(1, len(tokens) - 5):
        if tokens[at] == start and tokens[at + 5] == end:
            shares = logits_SY[at : at + 4, bins].softmax(-1)
            names = tokenizer.convert_ids_to_tokens(tokens[at + 1 : at + 5])
            labelled = torch.tensor([int(name.strip("<|>")) / 999 for name in names])
            found.append(((shares * places).sum(-1), labelled))
    return found


def one_minus_giou(box: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """As the paper draws it, side by side; sides that end before they begin have no length."""

    def length(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return (high - low).clamp(min=0)

    def area(one: torch.Tensor) -> torch.Tensor:
        return length(one[0], one[2]) * length(one[1], one[3])

    width = length(torch.max(box[0], other[0]), torch.min(box[2], other[2]))
    height = length(torch.max(box[1], other[1]), torch.min(box[3], other[3]))
    union = area(box) + area(other) - width * height
    hull_width = length(torch.min(box[0], other[0]), torch.max(box[2], other[2]))
    hull_height = length(torch.min(box[1], other[1]), torch.max(box[3], other[3]))
    hull = hull_width * hull_height
    return 1 - (width * height / union - (hull - union) / hull)


def parts_of(model: Any, items: list[tuple[Item, int]], tokenizer: Any) -> Parts:
    """Every sample by itself through transformers' model."""
    zero = torch.zeros(())
    losses, weights = [zero, zero], [zero, zero]
    pairs = []
    for item, task in items:
        logits_SY = model(**model_inputs(model, item)).logits[0].float()
        tokens_S = torch.from_numpy(item.encoded.tokens_S)
        weights_S = torch.from_numpy(item.encoded.loss_weights_S())[1:]
        losses_S = F.cross_entropy(logits_SY[:-1], tokens_S[1:], reduction="none")
        losses[task] = losses[task] + (losses_S * weights_S).sum()
        weights[task] = weights[task] + weights_S.sum()
        pairs += boxes_of(logits_SY, tokens_S.tolist(), tokenizer)
    assert len(pairs) > 5
    return Parts(
        torch.stack(losses),
        torch.stack(weights),
        torch.stack([(box - other).abs().sum() for box, other in pairs]),
        torch.stack([one_minus_giou(box, other) for box, other in pairs]),
    )


def reference_of(model: Any, objective: torch.Tensor) -> Reference:
    model.zero_grad()
    objective.backward(retain_graph=True)
    gradients = {name: None if one.grad is None else one.grad.clone() for name, one in model.named_parameters()}
    return Reference(torch.zeros(0), objective.item(), gradients)


@pytest.fixture(scope="module")
def setup(root: Path, workers: PoolKeeper) -> tuple[Any, Parts]:
    items = workers(1).run(cases.items_of_tasks, root=root)[0]
    model = load_reference(root / "model")
    return model, parts_of(model, items, AutoTokenizer.from_pretrained(root / "model"))


def check(workers: PoolKeeper, recipe: Any, layout: dict[str, Any], **arguments: Any) -> list[dict[str, Any]]:
    num_ranks = int(np.prod([size for name, size in layout.items() if name.endswith("_size")]))
    figures = []
    for measured, found in workers(num_ranks).run(cases.step_against, recipe=recipe, **arguments):
        assert measured["loss"] <= RELATIVE and measured["gradients"] <= RELATIVE, measured
        figures.append(found)
    assert json.dumps(figures[0]) == json.dumps(figures[-1]), "ranks have learned different weights of tasks"
    return figures[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_uncertainty_and_boxes(layout: str, root: Path, setup: tuple[Any, Parts], workers: PoolKeeper) -> None:
    model, parts = setup
    s_K = torch.tensor([0.5, -0.3], requires_grad=True)
    terms_K = torch.exp(-s_K) * parts.losses_K + parts.weights_K * s_K / 2
    boxes = (5 * parts.l1_B + 2 * parts.giou_B).mean()
    objective = terms_K.sum() / parts.weights_K.sum() + BOX_COEFFICIENT * boxes
    expected = reference_of(model, objective)
    sft = {"task_weighting": "uncertainty", "task_weight_lr": 0.1, "box_loss_coeff": BOX_COEFFICIENT}
    recipe = cases.recipe_of(root, LAYOUTS[layout], **sft)
    values = torch.tensor(s_K.tolist()).tolist()
    found = check(workers, recipe, LAYOUTS[layout], expected=expected, weighting={"values": values})
    assert s_K.grad is not None
    torch.optim.Adam([s_K], lr=0.1).step()
    assert found["state"]["values"] == pytest.approx(s_K.tolist(), rel=1e-6)
    # Adam's first moment is a tenth of the gradient
    assert found["state"]["exp_avg"] == pytest.approx((s_K.grad / 10).tolist(), rel=1e-5)
    assert found["box/l1"] == pytest.approx(parts.l1_B.mean().item(), rel=1e-5)
    assert found["box/giou"] == pytest.approx(parts.giou_B.mean().item(), rel=1e-5)
    assert found["box/count"] == len(parts.l1_B)
    means = (parts.losses_K / parts.weights_K).tolist()
    assert [found[f"task/{name}/loss"] for name in cases.TASKS] == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradnorm(layout: str, root: Path, setup: tuple[Any, Parts], workers: PoolKeeper) -> None:
    model, parts = setup
    weights_K = torch.tensor([1.4, 0.6])
    shares_K = weights_K * parts.losses_K / parts.weights_K.sum()
    expected = reference_of(model, shares_K.sum())
    norm = model.model.language_model.norm.weight
    norms = [torch.autograd.grad(share, norm, retain_graph=True)[0].norm().item() for share in shares_K]
    recipe = cases.recipe_of(root, LAYOUTS[layout], task_weighting="gradnorm", task_weight_lr=0.1)
    before = {"initial": [9.0, 5.0], "weights": {"values": [1.4, 0.6]}}
    found = check(workers, recipe, LAYOUTS[layout], expected=expected, weighting=before)
    assert [found[f"task/{name}/grad_norm"] for name in cases.TASKS] == pytest.approx(norms, rel=1e-5)

    # Algorithm 1 with these norms; Adam's first step is the learning rate, whatever the gradient's size.
    progress = [
        loss / first for loss, first in zip((parts.losses_K / parts.weights_K).tolist(), (9.0, 5.0), strict=True)
    ]
    mean, rates = sum(norms) / 2, [one / (sum(progress) / 2) for one in progress]
    signs = [np.sign(norm - mean * rate**1.5) for norm, rate in zip(norms, rates, strict=True)]
    stepped = [weight - 0.1 * sign for weight, sign in zip((1.4, 0.6), signs, strict=True)]
    after = [2 * weight / sum(stepped) for weight in stepped]
    assert found["state"]["weights"]["values"] == pytest.approx(after, rel=1e-6)


def test_factors_of_one_change_nothing(root: Path, setup: tuple[Any, Parts], workers: PoolKeeper) -> None:
    model, parts = setup
    expected = reference_of(model, parts.losses_K.sum() / parts.weights_K.sum())
    check(workers, cases.recipe_of(root, {}, task_weighting="fixed"), {}, expected=expected, weighting={})
