"""The loss of masks beside the cross entropy of words, over tensor- and context-parallel ranks.

Shape suffixes: T tokens of the whole row, V visual tokens and G tokens for masks that this context rank holds, M masks
of the row that are learned, X visual tokens of all their images, one mask behind the other, D width of the vectors.
"""

from dataclasses import dataclass

import torch

from megavlm.config.schema import Recipe
from megavlm.data.sample import Batch
from megavlm.losses.masks import LogitsAndMasks, mask_sums, segmentation_loss
from megavlm.models.architecture import Architecture, MaskHeadArchitecture
from megavlm.parallel.context import summed_over_context, zigzag_index
from megavlm.parallel.groups import Groups

MASK_FIGURES = ("mask/bce", "mask/dice", "mask/iou")


@dataclass(frozen=True)
class MaskObjective:
    """Cross entropy and Dice of the masks that answers name, by tokens of their images.

    The logit of a visual token is the product of its vector with the query of the mask's token, divided by the root of
    their width. The loss is LISA's (arXiv 2308.00692, equations 3 and 4); the target, where LISA has pixels and a
    decoder for them, is the share of the token's area that the mask covers.

    Attributes:
        groups: process groups.
        head: of the model.
        image_token_id: of visual tokens.
        coefficient: of the mean over the global batch's masks, beside the mean of the cross entropy of words.
        bce_weight: of the cross entropy.
        dice_weight: of Dice.
    """

    groups: Groups
    head: MaskHeadArchitecture
    image_token_id: int
    coefficient: float
    bce_weight: float
    dice_weight: float

    def count(self, batch: Batch) -> int:
        """Masks that are learned in a row: those whose token is."""
        return int(_is_learned(batch).sum())

    def sums(self, outputs: LogitsAndMasks, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """This context rank's share of the loss of the row's masks, and of [`MASK_FIGURES`, masks] of them.

        A mask's token and the tokens of its image may lie on different context ranks: queries are brought together,
        each rank multiplies those of its own visual tokens, and what the losses are made of is brought together again,
        both forwards and backwards. A row without masks goes the same way, with nothing in it: parameters of the head
        then have a gradient of 0, not none.
        """
        context, device = self.groups.context, outputs.visual_VD.device
        is_learned_M = _is_learned(batch)
        places_M3 = batch.mask_places_M3[is_learned_M]
        visual_T, segments_T = (self._local(batch, one) for one in (self.image_token_id, self.head.segment_token_id))
        numbers_M = segments_T[places_M3[:, 0]]
        own_M = torch.nonzero(numbers_M >= 0)[:, 0]
        queries_MD = outputs.queries_GD.new_zeros(len(places_M3), self.head.width, dtype=torch.float32)
        taken = outputs.queries_GD[numbers_M[own_M].to(device)].float()
        queries_MD = queries_MD.index_add(0, own_M.to(device), taken)
        if len(places_M3):  # of the row, so on every context rank
            queries_MD = summed_over_context(queries_MD, context)

        masks_X = torch.repeat_interleave(torch.arange(len(places_M3)), places_M3[:, 2])
        within_X = torch.arange(len(masks_X)) - (places_M3[:, 2].cumsum(0) - places_M3[:, 2])[masks_X]
        visual_X = visual_T[places_M3[masks_X, 1] + within_X]
        shares_X = batch.mask_shares_X[torch.repeat_interleave(is_learned_M, batch.mask_places_M3[:, 2])]
        own_X = visual_X >= 0
        masks_X, visual_X, shares_X = (one[own_X].to(device) for one in (masks_X, visual_X, shares_X))
        logits_X = (queries_MD[masks_X] * outputs.visual_VD[visual_X].float()).sum(1) * self.head.width**-0.5
        sums_MK = mask_sums(logits_X, shares_X, masks_X, len(places_M3))
        if len(places_M3):
            sums_MK = summed_over_context(sums_MK, context)
        loss_sum, count, metrics = segmentation_loss(
            sums_MK, places_M3[:, 2].to(device), self.bce_weight, self.dice_weight
        )
        figures = torch.stack((*(metrics[name] for name in MASK_FIGURES), count))
        return loss_sum / context.size(), figures / context.size()

    def _local(self, batch: Batch, token_id: int) -> torch.Tensor:
        """The number of each such token among those that this context rank holds: int64 [T]; -1 of all others."""
        context = self.groups.context
        index_L = zigzag_index(batch.cu_seqlens, context.size(), context.rank())
        held = index_L[batch.tokens_T[index_L] == token_id]
        numbers_T = torch.full((len(batch.tokens_T),), -1)
        numbers_T[held] = torch.arange(len(held))
        return numbers_T


def _is_learned(batch: Batch) -> torch.Tensor:
    """Whether the token of each mask is learned: bool [masks of the row]."""
    return batch.loss_weights_T[batch.mask_places_M3[:, 0] - 1] > 0


def build_masks(recipe: Recipe, architecture: Architecture, groups: Groups) -> MaskObjective | None:
    """What a recipe says of masks; None: nothing."""
    knobs, head = recipe.sft, architecture.language.mask_head
    if head is None:
        return None
    return MaskObjective(
        groups,
        head,
        architecture.inputs.image_token_id,
        knobs.mask_loss_coeff,
        knobs.mask_bce_weight,
        knobs.mask_dice_weight,
    )
