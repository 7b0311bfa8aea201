import pytest
import torch
import torch.distributed as dist
from transformers.loss import loss_for_object_detection as theirs

from megavlm.losses.grounding import (
    box_loss,
    corners_of,
    expected_coordinate,
    expected_coordinate_of_vocabulary,
    generalized_iou,
)

NUM_BOXES = 50


def boxes(seed):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(NUM_BOXES, 2, 2, generator=generator).sort(dim=1).values
    return corners.flatten(1)


def test_generalized_iou_equals_transformers():
    first, second = boxes(0).requires_grad_(), boxes(1)
    ours = generalized_iou(first, second)
    reference = theirs.generalized_box_iou(first, second).diagonal()
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)
    assert (ours < 0).any() and (ours > 0).any()
    upstream = torch.linspace(-1, 1, NUM_BOXES)
    actual, expected = (torch.autograd.grad((value * upstream).sum(), first)[0] for value in (ours, reference))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ((0.0, 0.0, 2.0, 2.0), 1.0),
        # A quarter in common: 1 / 7 of the union of 7, in a hull of 9.
        ((1.0, 1.0, 3.0, 3.0), 1 / 7 - 2 / 9),
        # Apart: 8 of a hull of 2 x 6 are covered.
        ((0.0, 4.0, 2.0, 6.0), -4 / 12),
        # Turned inside out: no area; the hull is that of its nearer corners.
        ((2.0, 2.0, 0.0, 0.0), 0.0),
    ],
)
def test_generalized_iou_of_known_boxes(second, expected):
    actual = generalized_iou(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([second]))
    torch.testing.assert_close(actual, torch.tensor([expected]))


def test_points_and_far_boxes_give_finite_gradients():
    first = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.9, 0.9, 0.1, 0.1]], requires_grad=True)
    second = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.3, 0.3]])
    loss_sum, _, _ = box_loss(first, second)
    loss_sum.backward()
    assert loss_sum.isfinite() and first.grad.isfinite().all()


def test_box_loss_adds_both_parts():
    predicted, target = boxes(0), boxes(1)
    loss_sum, count, metrics = box_loss(predicted.bfloat16(), target, l1_weight=3.0, giou_weight=0.5)
    rounded = predicted.bfloat16().float()
    l1 = torch.nn.functional.l1_loss(rounded, target, reduction="sum")
    giou = (1 - theirs.generalized_box_iou(rounded, target).diagonal()).sum()
    torch.testing.assert_close(loss_sum, 3 * l1 + 0.5 * giou, rtol=1e-5, atol=0)
    torch.testing.assert_close(metrics["box/l1"], l1)
    torch.testing.assert_close(metrics["box/giou"], giou)
    assert count == NUM_BOXES


def test_corners_of_centres():
    assert corners_of(torch.tensor([[5.0, 6.0, 4.0, 2.0]])).tolist() == [[3, 5, 7, 7]]


def test_expected_coordinate():
    certain = torch.full((1, 5), -100.0)
    certain[0, 3] = 100.0
    assert expected_coordinate(certain).item() == 0.75
    between = torch.full((1, 5), -torch.inf)
    between[0, 1], between[0, 2] = torch.tensor(3.0).log(), 0.0
    torch.testing.assert_close(expected_coordinate(between), torch.tensor([0.75 * 0.25 + 0.25 * 0.5]))


VOCABULARY, NUM_BINS, NUM_COORDINATES = 24, 7, 10


def vocabulary_example(ids):
    generator = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(NUM_COORDINATES, VOCABULARY, generator=generator)
    upstream = torch.randn(NUM_COORDINATES, generator=generator)
    return logits, torch.tensor(ids), upstream


# All on both ranks; all on the first, so that the second has none; out of order.
@pytest.mark.parametrize("ids", [range(8, 15), range(7), (23, 0, 12, 5, 11, 20, 1)], ids=str)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_expected_coordinate_of_a_sharded_vocabulary(num_ranks, ids, workers):
    logits, ids, upstream = vocabulary_example(list(ids))
    theirs = logits.double().requires_grad_()
    expected = theirs[:, ids].softmax(1) @ (torch.arange(NUM_BINS).double() / (NUM_BINS - 1))
    (expected * upstream).sum().backward()
    results = workers(num_ranks).run(expected_of_part, logits=logits, ids=ids, upstream=upstream)
    for value, _ in results:
        torch.testing.assert_close(value, expected.detach().float(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(value, expected_coordinate(logits[:, ids]), rtol=1e-6, atol=1e-6)
    gradient = torch.cat([one for _, one in results], dim=1)
    torch.testing.assert_close(gradient, theirs.grad.float(), rtol=1e-5, atol=1e-6)
    assert not gradient[:, [number for number in range(VOCABULARY) if number not in ids]].any()


def expected_of_part(logits, ids, upstream):
    group = dist.group.WORLD
    part = logits.chunk(group.size(), dim=1)[group.rank()].clone().requires_grad_()
    value = expected_coordinate_of_vocabulary(part, ids, group)
    (value * upstream).sum().backward()
    empty = expected_coordinate_of_vocabulary(part[:0], ids, group)
    assert empty.shape == (0,) and empty.requires_grad
    return value.detach(), part.grad
