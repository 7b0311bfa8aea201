"""Losses of masks against torch and transformers on each mask by itself, a case by hand, and sums over parts."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers.loss.loss_for_object_detection import dice_loss

from megavlm.losses.masks import mask_sums, segmentation_loss

LENGTHS = (6, 20, 1, 9)


def drawn():
    generator = torch.Generator().manual_seed(0)
    logits_X = 4 * torch.randn(sum(LENGTHS), generator=generator)
    shares_X = torch.rand(sum(LENGTHS), generator=generator).mul(1.6).sub(0.3).clamp(0, 1)
    masks_X = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    return logits_X.requires_grad_(), shares_X, masks_X


def test_each_mask_by_itself():
    logits_X, shares_X, masks_X = drawn()
    sums_MK = mask_sums(logits_X, shares_X, masks_X, len(LENGTHS))
    loss_sum, count, metrics = segmentation_loss(sums_MK, torch.tensor(LENGTHS), 2.0, 0.5)
    (actual,) = torch.autograd.grad(loss_sum, logits_X)

    pairs = list(zip(logits_X.split(LENGTHS), shares_X.split(LENGTHS), strict=True))
    bce = [F.binary_cross_entropy_with_logits(logits, shares) for logits, shares in pairs]
    dices = [dice_loss(logits[None], shares[None], 1) for logits, shares in pairs]
    reference = 2 * sum(bce) + 0.5 * sum(dices)
    (expected,) = torch.autograd.grad(reference, logits_X)
    assert loss_sum.item() == pytest.approx(reference.item(), rel=1e-6) and count == len(LENGTHS)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    assert metrics["mask/bce"].item() == pytest.approx(sum(one.item() for one in bce), rel=1e-6)
    assert metrics["mask/dice"].item() == pytest.approx(sum(one.item() for one in dices), rel=1e-6)
    ious = []
    for logits, shares in pairs:
        found, covered = logits.sigmoid() > 0.5, shares >= 0.5
        either = (found | covered).sum().item()
        ious.append((found & covered).sum().item() / either if either else 1.0)
    assert metrics["mask/iou"].item() == pytest.approx(sum(ious)) and 0 < sum(ious) < len(LENGTHS)


def test_a_case_by_hand():
    # Probabilities 3/4 and 1/5, of tokens that are covered whole and to a quarter.
    logits_X = torch.tensor([math.log(3), -math.log(4)])
    sums_MK = mask_sums(logits_X, torch.tensor([1.0, 0.25]), torch.tensor([0, 0]), 1)
    loss_sum, count, metrics = segmentation_loss(sums_MK, torch.tensor([2]), 2.0, 0.5)
    bce = -(math.log(3 / 4) + 0.25 * math.log(1 / 5) + 0.75 * math.log(4 / 5)) / 2
    # product 3/4 + 1/20 = 4/5, prediction 19/20, target 5/4
    dice = 1 - (2 * 4 / 5 + 1) / (19 / 20 + 5 / 4 + 1)
    assert loss_sum.item() == pytest.approx(2 * bce + 0.5 * dice, rel=1e-6)
    assert metrics["mask/iou"] == 1 and count == 1


def test_tokens_of_a_mask_on_several_ranks_add_up():
    logits_X, shares_X, masks_X = drawn()
    whole_MK = mask_sums(logits_X, shares_X, masks_X, len(LENGTHS))
    parts = [mask_sums(logits_X[at::3], shares_X[at::3], masks_X[at::3], len(LENGTHS)) for at in range(3)]
    torch.testing.assert_close(torch.stack(parts).sum(0), whole_MK, rtol=1e-6, atol=1e-6)


def test_thin_masks_and_none():
    """A mask too thin to cover half a token is found when nothing is; a row may have no masks at all."""
    thin = torch.tensor([0.1, 0.2, 0.0])
    for logits, iou in ((torch.full((3,), -5.0), 1.0), (torch.tensor([5.0, -5, -5]), 0.0)):
        sums_MK = mask_sums(logits, thin, torch.zeros(3, dtype=torch.long), 1)
        assert segmentation_loss(sums_MK, torch.tensor([3]))[2]["mask/iou"] == iou
    logits_X = torch.zeros(0, requires_grad=True)
    sums_MK = mask_sums(logits_X, torch.zeros(0), torch.zeros(0, dtype=torch.long), 0)
    loss_sum, count, _ = segmentation_loss(sums_MK, torch.zeros(0))
    loss_sum.backward()
    assert loss_sum == 0 and count == 0 and logits_X.grad is not None


def test_extreme_logits_have_finite_gradients():
    logits_X = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    sums_MK = mask_sums(logits_X, torch.tensor([1.0, 0, 0, 1]), torch.zeros(4, dtype=torch.long), 1)
    loss_sum, _, _ = segmentation_loss(sums_MK, torch.tensor([4]))
    loss_sum.backward()
    assert loss_sum.isfinite() and logits_X.grad is not None and logits_X.grad.isfinite().all()
