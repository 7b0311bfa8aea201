"""Embeddings of images and texts: CLIP's and SigLIP's losses over the whole global batch.

A row is two sequences, its images and its text; the model reads both, and the last token of each gives its embedding.
Every pair of the global batch has a part in the loss of every other, whatever microbatch or rank it is in. So
embeddings go through the model twice, as in GradCache (Gao et al., arXiv 2101.06983): before the step all are computed
without a graph, the loss of them all is differentiated by each embedding, and in the step each microbatch goes on from
the gradients of its own. By the chain rule these are the gradients of the loss of the whole batch.

Shape suffixes: L tokens of this context-parallel rank, X the embedding with scale and bias of logits behind it, D width
of an embedding, Q sequences of the row (images and text in turn), P samples of the row that count, M samples of the
global batch, N those of them whose logits this rank computes, K what is known of a sample (`_Columns`).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megavlm.config.schema import Recipe
from megavlm.data.dataset import Dataset
from megavlm.data.sample import Batch
from megavlm.errors import RunError
from megavlm.losses.contrastive import clip_loss, retrieval_hits, siglip_loss
from megavlm.losses.reduce import global_sums
from megavlm.models.architecture import Architecture
from megavlm.models.embedding_head import NUM_LOGIT_COLUMNS
from megavlm.parallel.groups import Groups
from megavlm.train.stages.sequences import counting_samples, last_wanted_tokens, sequence_rows
from megavlm.train.stages.stage import Sums

RECALLS = ("recall_at_1/image_to_text", "recall_at_1/text_to_image")
_TOLD = ("loss", "logit_scale", "logit_bias", *RECALLS)
"""What is known of each sample behind the gradients of its embeddings: its share of the loss, and of the gradients of
scale and bias; whether its text, and its image, is found first."""


@dataclass(frozen=True)
class WholeBatch:
    """The loss of all pairs of the global batch, and its gradients, before the step.

    Attributes:
        groups: process groups.
        loss_type: softmax or sigmoid.
        embedding_dim: D.
    """

    groups: Groups
    loss_type: Literal["softmax", "sigmoid"]
    embedding_dim: int

    @property
    def num_columns(self) -> int:
        """2 D + K, of `result`."""
        return 2 * self.embedding_dim + len(_TOLD)

    def read(self, batch: Batch) -> Batch:
        """All of the row."""
        return batch

    def remaining(self, batch: Batch, ahead: torch.Tensor, rows: Dataset) -> Batch:
        """All of it again, this time to learn."""
        return batch

    def new_sums(self, num_samples: int, device: torch.device) -> torch.Tensor:
        """[M + 1, 2 D]: of each sample the embeddings of image and text; at the end scale and bias of logits."""
        return torch.zeros(num_samples + 1, 2 * self.embedding_dim, device=device)

    def add(self, sums: torch.Tensor, outputs_LX: torch.Tensor, batch: Batch) -> None:
        """Put the row's embeddings into their places; only one of the context ranks, which all have the same."""
        embeddings_P2D, logit_scale, logit_bias = embeddings_of(outputs_LX, batch, self.groups)
        if self.groups.context.rank() > 0 or not len(embeddings_P2D):
            return
        first = batch.first_number
        sums[first : first + len(embeddings_P2D)] = embeddings_P2D.flatten(1)
        if first == 0:
            sums[-1, 0], sums[-1, 1] = logit_scale, logit_bias

    def result(self, sums: torch.Tensor) -> torch.Tensor:
        """[M, 2 D + K]: of each sample the gradients of its embeddings, and `_TOLD`; each rank computes some rows.

        Raises:
            RunError: there is but one sample.
        """
        if len(sums) < 3:
            raise RunError("contrastive: one row alone; images are told from the texts of other rows, so give more")
        world, rank = dist.get_world_size(), dist.get_rank()
        images_MD, texts_MD = sums[:-1].view(-1, 2, self.embedding_dim).unbind(1)
        first = sum(len(part) for part in images_MD.tensor_split(world)[:rank])
        mine = slice(first, first + len(images_MD.tensor_split(world)[rank]))
        leaves = [images_MD[mine], texts_MD[mine], sums[-1, 0], sums[-1, 1]]
        images_ND, texts_ND, scale, bias = (leaf.clone().requires_grad_() for leaf in leaves)
        everybody = dist.group.WORLD
        assert everybody is not None
        with torch.enable_grad():
            if self.loss_type == "softmax":
                loss_sum, _, _ = clip_loss(images_ND, texts_ND, scale, everybody)
            else:
                loss_sum, _, _ = siglip_loss(images_ND, texts_ND, scale, bias, everybody)
            loss_sum.backward()
        told_MK = sums.new_zeros(len(images_MD), self.num_columns)
        if len(images_ND):
            assert images_ND.grad is not None and texts_ND.grad is not None and scale.grad is not None
            slope = torch.zeros_like(bias) if bias.grad is None else bias.grad
            shares = torch.stack((loss_sum.detach(), scale.grad, slope)) / len(images_ND)
            hits = (
                retrieval_hits(images_ND.detach(), texts_MD, first),
                retrieval_hits(texts_ND.detach(), images_MD, first),
            )
            gradients = images_ND.grad, texts_ND.grad
            told_MK[mine] = torch.cat(
                (*gradients, shares.expand(len(images_ND), -1), *(hit[:, None] for hit in hits)), dim=1
            )
        return global_sums(told_MK, counts=True)


@dataclass(frozen=True)
class ContrastiveTraining:
    """The `contrastive` stage."""

    groups: Groups
    look_ahead: WholeBatch
    census: ClassVar[None] = None
    split_gradients: ClassVar[None] = None
    memory: ClassVar[None] = None
    metric_sizes: ClassVar[dict[str, int]] = dict.fromkeys((*RECALLS, "logit_scale", "logit_bias"), 1)

    def loss(self, outputs_LX: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        """Sum over the pairs of the row, and how many there are; each context rank has its share of both.

        The value is the pairs' share of the loss of the whole batch; the gradient that of the latter.
        """
        num_context, device = self.groups.context.size(), outputs_LX.device
        embeddings_P2D, logit_scale, logit_bias = embeddings_of(outputs_LX, batch, self.groups)
        assert batch.ahead is not None
        number, count = batch.first_number, len(embeddings_P2D)
        told_PK = batch.ahead[number : number + count].to(device)
        gradients_PX, known_PK = told_PK.split((2 * self.look_ahead.embedding_dim, len(_TOLD)), dim=1)
        known = dict(zip(_TOLD, known_PK.sum(0), strict=True))
        surrogate = (gradients_PX * embeddings_P2D.flatten(1)).sum()
        surrogate = surrogate + known["logit_scale"] * logit_scale + known["logit_bias"] * logit_bias
        loss_sum = known["loss"] + (surrogate - surrogate.detach())
        metrics = {name: known[name] for name in RECALLS}
        metrics |= {"logit_scale": logit_scale.detach().exp() * count, "logit_bias": logit_bias.detach() * count}
        sums = {name: value[None] / num_context for name, value in metrics.items()}
        return loss_sum / num_context, loss_sum.new_tensor(float(count)) / num_context, sums

    def count(self, batch: Batch) -> float:
        """As `Stage` says."""
        return float(len(counting_samples(batch)))

    def figures(self, sums: Sums, count: float) -> dict[str, float]:
        """Shares of images and texts that find each other first, and what cosines are multiplied by (1 / temperature).

        And what is added to them, with sigmoid.
        """
        names = [*RECALLS, "logit_scale", *(["logit_bias"] if self.look_ahead.loss_type == "sigmoid" else [])]
        return {name: float(sums[name]) / count for name in names}


def embeddings_of(
    outputs_LX: torch.Tensor, batch: Batch, groups: Groups
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised embeddings of the samples that count, fp32 [P, 2, D] (image, text), and scale and bias of logits.

    Args:
        outputs_LX: of this rank's tokens, by the model's head.
        batch: the row.
        groups: process groups.
    """
    samples_P = counting_samples(batch).to(outputs_LX.device)
    last_QX = sequence_rows(outputs_LX, last_wanted_tokens(batch.real_T, batch), batch, groups)
    last_QD = last_QX[:, :-NUM_LOGIT_COLUMNS]
    embeddings_P2D = F.normalize(last_QD.view(-1, 2, last_QD.shape[1])[samples_P], dim=-1)
    logit_scale, logit_bias = outputs_LX[0, -NUM_LOGIT_COLUMNS:].float().unbind()
    return embeddings_P2D, logit_scale, logit_bias


def build_contrastive(recipe: Recipe, architecture: Architecture, groups: Groups) -> ContrastiveTraining:
    """The stage of a recipe."""
    knobs = recipe.contrastive
    return ContrastiveTraining(groups, WholeBatch(groups, knobs.loss_type, knobs.embedding_dim))
