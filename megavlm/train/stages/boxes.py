"""The loss of whole boxes beside the cross entropy of their tokens, over tensor- and context-parallel ranks.

Shape suffixes: T tokens of the whole row, L of this context-parallel rank, W this rank's part of the vocabulary,
B boxes of the row, K bins of a coordinate.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from megavlm.config.schema import Recipe
from megavlm.data.coordinates import coordinate_token_ids, find_boxes
from megavlm.data.sample import Batch
from megavlm.losses.chunked import Logits
from megavlm.losses.grounding import box_loss, expected_coordinate_of_vocabulary
from megavlm.parallel.context import summed_over_context, zigzag_index
from megavlm.parallel.groups import Groups


@dataclass(frozen=True)
class BoxObjective:
    """L1 and generalised IoU of expected boxes.

    A coordinate is what the probabilities of its 1000 tokens expect, each token standing for its place: the tokens are
    those of Pix2Seq (arXiv 2109.10852), the expectation that of arXiv 1711.08229, the loss that of DETR
    (arXiv 2005.12872, equation 2).

    Attributes:
        groups: process groups.
        ids_K: int64 ids of the coordinate tokens.
        coefficient: of the mean over the global batch's boxes, beside the mean of the cross entropy.
        l1_weight: of L1.
        giou_weight: of 1 - generalised IoU.
    """

    groups: Groups
    ids_K: torch.Tensor
    coefficient: float
    l1_weight: float
    giou_weight: float

    def count(self, batch: Batch) -> int:
        """Boxes that are learned in a row."""
        return len(find_boxes(batch.labels_T, batch.loss_weights_T, self.ids_K).corners_B4)

    def sums(self, logits_LW: Logits, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """This context rank's share of the loss of the row's boxes, and of [L1, 1 - GIoU, boxes] of them.

        The four tokens of a box may lie on different context ranks: each computes what its own expect, and all are
        brought together, forwards and backwards.
        """
        context, device = self.groups.context, logits_LW.device
        boxes = find_boxes(batch.labels_T, batch.loss_weights_T, self.ids_K)
        if not len(boxes.corners_B4):  # of the row, so on every context rank
            nothing = torch.zeros((), device=device)
            return nothing, torch.zeros(3, device=device)
        local_T = torch.full((len(batch.labels_T),), -1)
        index_L = zigzag_index(batch.cu_seqlens, context.size(), context.rank())
        local_T[index_L] = torch.arange(len(index_L))
        places = local_T[boxes.positions_B4.flatten()]
        own = torch.nonzero(places >= 0)[:, 0].to(device)
        # also where none is its own: the ranks meet in the backward pass, too
        expected = expected_coordinate_of_vocabulary(
            logits_LW[places[places >= 0].to(device)], self.ids_K.to(device), self.groups.tensor
        )
        coordinates = torch.zeros(len(places), device=device).index_add(0, own, expected)
        predicted_B4 = summed_over_context(coordinates, context).view(-1, 4)
        loss_sum, count, metrics = box_loss(predicted_B4, boxes.corners_B4.to(device), self.l1_weight, self.giou_weight)
        figures = torch.stack((metrics["box/l1"], metrics["box/giou"], count))
        return loss_sum / context.size(), figures / context.size()


def build_boxes(recipe: Recipe, groups: Groups) -> BoxObjective | None:
    """What a recipe says of boxes; None: they are tokens like others.

    Raises:
        UseError: the tokenizer has no coordinate tokens.
    """
    knobs = recipe.sft
    if not knobs.box_loss_coeff:
        return None
    ids_K = torch.tensor(coordinate_token_ids(Path(recipe.model.hf_dir)))
    return BoxObjective(groups, ids_K, knobs.box_loss_coeff, knobs.box_l1_weight, knobs.box_giou_weight)
