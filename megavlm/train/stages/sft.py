"""Supervised fine-tuning: next-token cross entropy on what the rows say to learn.

Shape suffixes: L tokens of this context-parallel rank, W this rank's part of the vocabulary, T the whole row.
"""

from dataclasses import dataclass

import torch

from megavlm.data.sample import Batch
from megavlm.losses.cross_entropy import cross_entropy
from megavlm.parallel.context import local_part
from megavlm.parallel.groups import Groups


@dataclass(frozen=True)
class SupervisedFineTuning:
    """The SFT stage."""

    groups: Groups

    def loss(self, logits_LW: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Sum over this rank's tokens, and the weight to divide by (once, over the global batch)."""
        context = self.groups.context
        labels_L, weights_L = (
            local_part(tensor_T, batch.cu_seqlens, context.size(), context.rank()).to(logits_LW.device)
            for tensor_T in (batch.labels_T, batch.loss_weights_T)
        )
        return cross_entropy(logits_LW, labels_L, weights_L, self.groups.tensor)
