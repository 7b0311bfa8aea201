"""Losses of masks over an image's visual tokens: cross entropy and Dice, as LISA weighs them.

A mask says of each visual token of its image which share of the token's area it covers. Masks have as many tokens as
their images, so they lie one behind the other, and what a loss is made of is summed up mask by mask first: where the
tokens of an image lie on several ranks, those sums are what the ranks exchange.

Shape suffixes: X tokens of all masks, one mask behind the other, M masks, K sums, D width of the vectors, V visual
tokens and G tokens for masks of a context rank, in the order in which it holds them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megavlm.losses.chunked import Logits

NUM_MASK_SUMS = 6


@dataclass(frozen=True)
class LogitsAndMasks:
    """What a model with a head for masks ends in.

    Attributes:
        logits: over words.
        visual_VD: vectors of visual tokens of this context rank.
        queries_GD: those of its tokens for masks.
    """

    logits: Logits
    visual_VD: torch.Tensor
    queries_GD: torch.Tensor


def words_of(outputs: Logits | LogitsAndMasks) -> Logits:
    """The logits over words."""
    return outputs.logits if isinstance(outputs, LogitsAndMasks) else outputs


def mask_sums(logits_X: torch.Tensor, shares_X: torch.Tensor, masks_X: torch.Tensor, num_masks: int) -> torch.Tensor:
    """What the losses of masks are made of, fp32 [M, K]; sums over parts of the tokens may be added up.

    Columns: cross entropy; Dice's product, prediction and target (with gradients); and for intersection over union, of
    what is predicted with more than 0.5 and covered to half at least, tokens of both and tokens of either.

    Args:
        logits_X: of "the token is part of the mask".
        shares_X: share of the token that the mask covers, from 0 to 1.
        masks_X: int64 number of the token's mask.
        num_masks: M.
    """
    logits_X, shares_X = logits_X.float(), shares_X.float()
    found_X = logits_X.sigmoid()
    entropy_X = F.binary_cross_entropy_with_logits(logits_X, shares_X, reduction="none")
    is_found_X, is_covered_X = logits_X > 0, shares_X >= 0.5
    both_X, either_X = is_found_X & is_covered_X, is_found_X | is_covered_X
    columns = (entropy_X, found_X * shares_X, found_X, shares_X, both_X.float(), either_X.float())
    return logits_X.new_zeros(num_masks, NUM_MASK_SUMS).index_add(0, masks_X, torch.stack(columns, dim=1))


def segmentation_loss(
    sums_MK: torch.Tensor, num_tokens_M: torch.Tensor, bce_weight: float = 2.0, dice_weight: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Binary cross entropy, a mean over each mask's tokens, and Dice: arXiv 2308.00692 (LISA), equations 3 and 4.

    Dice (arXiv 1606.04797) has 1 added to both counts, as in DETR (arXiv 2005.12872) and MaskFormer (2107.06278).

    Args:
        sums_MK: from `mask_sums`, over all tokens of each mask.
        num_tokens_M: tokens of each mask's image.
        bce_weight: of the cross entropy (LISA's).
        dice_weight: of Dice (LISA's).

    Returns:
        The sum over masks (fp32), their number (fp32), and sums without weight of both parts and of the intersection
        over union at 0.5; a mask that covers no token to half and of which none is predicted has 1.
    """
    entropy_M, product_M, found_M, covered_M, both_M, either_M = sums_MK.unbind(1)
    bce_M = entropy_M / num_tokens_M
    dice_M = 1 - (2 * product_M + 1) / (found_M + covered_M + 1)
    iou_M = torch.where(either_M > 0, both_M / either_M.clamp(min=1), 1.0)
    loss_sum = (bce_weight * bce_M + dice_weight * dice_M).sum()
    metrics = {"mask/bce": bce_M.detach().sum(), "mask/dice": dice_M.detach().sum(), "mask/iou": iou_M.detach().sum()}
    return loss_sum, loss_sum.new_tensor(float(len(sums_MK))), metrics
