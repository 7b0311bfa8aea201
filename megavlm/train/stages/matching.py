"""Whether a text belongs to images, told from hard negatives of the global batch; embeddings are learned beside.

Each image is read with its own text and with one that is similar to it, and each text with an image that is similar:
three pairs a row, whose last tokens say match or no match (ALBEF, Li et al., arXiv 2107.07651, section 3.2). Similarity
is that of the contrastive loss, whose embeddings are computed before the step anyway (`contrastive.py`); so negatives
are chosen from the whole global batch. A pair is read where its images are: a text is only tokens, which every rank can
read from the rows, so no image is loaded or encoded a second time. What is drawn depends on the seed, the step and the
rows' places in the data set, never on the layout.

Shape suffixes: L tokens of this context-parallel rank, X the classes' logits, the embedding, and scale and bias of its
logits, D width of an embedding, M samples of the global batch, N those that this rank chooses for, C choices, E pairs
of the row, P its samples, 2 the classes.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist

from megavlm.config.numerics import row_multiples
from megavlm.config.schema import Recipe
from megavlm.config.stage_knobs import MatchingConfig
from megavlm.data.dataset import Dataset
from megavlm.data.matching import encode_match
from megavlm.data.packing import add_sequences
from megavlm.data.sample import Batch
from megavlm.errors import RunError
from megavlm.losses.matching import hard_negatives, matching_loss, share_out
from megavlm.losses.reduce import global_sums
from megavlm.models.architecture import Architecture
from megavlm.models.embedding_head import NUM_CLASSES
from megavlm.parallel.groups import Groups
from megavlm.train.stages.contrastive import ContrastiveTraining, WholeBatch, build_contrastive
from megavlm.train.stages.sequences import counting_samples, last_wanted_tokens, num_sequences, sequence_rows
from megavlm.train.stages.stage import Sums

NUM_CHOICES = 8
"""Images that a text draws; which of them it is shown with depends on how often others have drawn the same."""
KINDS = ("match", "no_match")
_HALF = 1 << 22
"""Whole numbers travel in two halves of so many values: fp32 has no larger ones without gaps."""
_TOLD = ("text_of_image", "image_of_text", "row high", "row low")
"""What is known of each sample behind what the contrastive loss knows: numbers in the global batch of the text that its
image is read with, and of the image that its text is read with (-1: none); its index in the data set."""


@dataclass(frozen=True)
class HardNegatives:
    """Embeddings of the global batch, what the contrastive loss makes of them, and who is told from whom.

    Attributes:
        groups: process groups.
        whole_batch: of the contrastive loss.
        knobs: of the recipe.
        seed: of what is drawn.
        image_token_id: of visual tokens.
        multiples: what sequences, and packed rows, are padded to multiples of.
    """

    groups: Groups
    whole_batch: WholeBatch
    knobs: MatchingConfig
    seed: int
    image_token_id: int
    multiples: tuple[int, int]

    def read(self, batch: Batch) -> Batch:
        """All of the row."""
        return batch

    def remaining(self, batch: Batch, ahead: torch.Tensor, rows: Dataset) -> Batch:
        """All of it again, and behind it the pairs that show its images."""
        num_samples = len(counting_samples(batch))
        if not num_samples or self.groups.place is None:  # it fills up a round, or this rank reads no texts
            return batch
        text_of_M, image_of_M, high_M, low_M = ahead[:, -len(_TOLD) :].cpu().long().unbind(1)
        index_of_M = (high_M * _HALF + low_M).tolist()
        pairs: list[tuple[int, int, int]] = []  # number in the row, of the image in the global batch, of the text
        for sample in range(num_samples):
            image = batch.first_number + sample
            texts = [image, int(text_of_M[image]), *torch.nonzero(image_of_M == image)[:, 0].tolist()]
            pairs += [(sample, image, text) for text in texts if text >= 0]
        prompt = self.knobs.match_prompt
        sequences = [encode_match(rows, index_of_M[image], index_of_M[text], prompt) for _, image, text in pairs]
        sample_multiple, total_multiple = self.multiples
        longer = add_sequences(
            batch,
            sequences,
            [sample for sample, _, _ in pairs],
            self.image_token_id,
            sample_multiple=sample_multiple,
            total_multiple=total_multiple,
        )
        return dataclasses.replace(longer, matches_E=torch.tensor([image == text for _, image, text in pairs]))

    def new_sums(self, num_samples: int, device: torch.device) -> torch.Tensor:
        """[M + 1, 2 D + 6]: embeddings, and halves of `contents_N3`; at the end scale and bias, and the step from 1.

        The step is 0 in evaluation.
        """
        width = 2 * self.whole_batch.embedding_dim
        return torch.zeros(num_samples + 1, width + 6, device=device)

    def add(self, sums: torch.Tensor, outputs_LX: torch.Tensor, batch: Batch) -> None:
        """Put embeddings and contents of the row's samples into their places."""
        width = 2 * self.whole_batch.embedding_dim
        self.whole_batch.add(sums[:, :width], outputs_LX[:, NUM_CLASSES:], batch)
        samples_P = counting_samples(batch)
        if self.groups.context.rank() > 0 or not len(samples_P):
            return
        assert batch.contents_N3 is not None
        contents_P3 = batch.contents_N3[samples_P].to(sums.device)
        halves = torch.stack((contents_P3 // _HALF, contents_P3 % _HALF), dim=-1)
        first = batch.first_number
        sums[first : first + len(samples_P), width:] = halves.flatten(1).to(sums.dtype)
        if first == 0 and batch.noise_seeds_N is not None:
            sums[-1, width] = float((batch.noise_seeds_N[0] >> 40) + 1)

    def result(self, sums: torch.Tensor) -> torch.Tensor:
        """[M, columns of the contrastive loss, and `_TOLD`].

        Raises:
            RunError: there is but one sample, or no two samples show and say something else.
        """
        width = 2 * self.whole_batch.embedding_dim
        told = self.whole_batch.result(sums[:, :width].contiguous())
        halves = sums[:-1, width:].long().view(-1, 3, 2)
        contents_M3 = halves[..., 0] * _HALF + halves[..., 1]
        partners = self._partners(sums[:, :width], contents_M3, int(sums[-1, width]))
        if not bool((partners >= 0).any()):
            raise RunError("matching: all rows of a global batch show, or say, the same: none is told from another")
        return torch.cat((told, partners.to(told), sums[:-1, width : width + 2]), dim=1)

    def _partners(self, sums: torch.Tensor, contents_M3: torch.Tensor, step: int) -> torch.Tensor:
        """Int64 [M, 2]: for each sample the number of the text, and of the image, that it is told from."""
        order_M = contents_M3[:, 0].argsort(stable=True)  # of rows in the data set: the same for every layout
        images_MD, texts_MD = sums[:-1].view(len(order_M), 2, -1)[order_M].unbind(1)
        contents_M3, scale = contents_M3[order_M], sums[-1, 0].exp()
        world, rank = dist.get_world_size(), dist.get_rank()
        mine = torch.arange(len(order_M), device=sums.device).tensor_split(world)[rank]

        def choices(own_MD: torch.Tensor, others_MD: torch.Tensor, kind: int, num_choices: int) -> torch.Tensor:
            indices = contents_M3[mine, 0].tolist()
            sampled = self.knobs.negatives == "sampled"
            seeds = [(self.seed, step, kind, index) for index in indices] if sampled else None
            contents_MX = contents_M3[:, 1:]
            return hard_negatives(own_MD[mine], others_MD, scale, contents_MX[mine], contents_MX, seeds, num_choices)

        chosen = torch.zeros(len(order_M), 1 + NUM_CHOICES, dtype=torch.int64, device=sums.device)
        chosen[mine, :1] = choices(images_MD, texts_MD, 0, 1)
        chosen[mine, 1:] = choices(texts_MD, images_MD, 1, NUM_CHOICES)
        chosen = global_sums(chosen, counts=True)
        shared = share_out(chosen[:, 1:].cpu(), self.knobs.max_texts_per_image)
        places = torch.stack((chosen[:, 0], torch.tensor(shared, device=chosen.device)), dim=1)
        partners = torch.full_like(places, -1)
        partners[order_M] = torch.where(places >= 0, order_M[places.clamp(min=0)], -1)
        return partners


@dataclass(frozen=True)
class MatchingTraining:
    """The `matching` stage."""

    groups: Groups
    look_ahead: HardNegatives
    contrastive: ContrastiveTraining
    census: ClassVar[None] = None
    split_gradients: ClassVar[None] = None
    memory: ClassVar[None] = None
    metric_sizes: ClassVar[dict[str, int]] = ContrastiveTraining.metric_sizes | dict.fromkeys(
        ("loss/matching", "loss/contrastive", *(f"{what}/{kind}" for what in ("count", "right") for kind in KINDS)), 1
    )

    def loss(self, outputs_LX: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        """Sum over the samples of the row, and how many there are; each context rank has its share of both.

        The loss of matching is a mean over all pairs of the global batch, the contrastive one over its samples.
        """
        num_context, look = self.groups.context.size(), self.look_ahead
        assert batch.ahead is not None
        embeds = dataclasses.replace(batch, ahead=batch.ahead[:, : look.whole_batch.num_columns])
        contrastive, count, sums = self.contrastive.loss(outputs_LX[:, NUM_CLASSES:], embeds)
        partners_M2 = batch.ahead[:, -len(_TOLD) :][:, :2]
        num_samples = len(partners_M2)
        num_pairs = num_samples + int((partners_M2 >= 0).sum())
        matching, told = self._pairs(outputs_LX, batch)
        matching = matching * num_samples / num_pairs / num_context
        told |= {"loss/contrastive": contrastive.detach() * num_context, "loss/matching": matching * num_context}
        metrics = {name: value.detach()[None] / num_context for name, value in told.items()}
        return look.knobs.contrastive_coeff * contrastive + matching, count, {**sums, **metrics}

    def _pairs(self, outputs_LX: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss summed over the row's pairs, and what they were."""
        if batch.matches_E is None:  # a row that only fills up a round
            zero = outputs_LX[:, :NUM_CLASSES].sum() * 0
            return zero, {f"{what}/{kind}": zero for what in ("count", "right") for kind in KINDS}
        places_E = last_wanted_tokens(batch.real_T, batch, num_sequences(batch), len(batch.matches_E))
        logits_E2 = sequence_rows(outputs_LX[:, :NUM_CLASSES], places_E, batch, self.groups)
        return matching_loss(logits_E2, batch.matches_E.to(logits_E2.device))

    def count(self, batch: Batch) -> float:
        """As `Stage` says."""
        return float(len(counting_samples(batch)))

    def figures(self, sums: Sums, count: float) -> dict[str, float]:
        """Both losses; of how many pairs it is told rightly whether they match: of all, of those that do, of others.

        And what the contrastive loss has.
        """
        number = {kind: float(sums[f"count/{kind}"]) for kind in KINDS}
        right = {kind: float(sums[f"right/{kind}"]) for kind in KINDS}
        found = {f"accuracy/{kind}": right[kind] / number[kind] for kind in KINDS}
        found["accuracy"] = sum(right.values()) / sum(number.values())
        found |= {name: float(sums[name]) / count for name in ("loss/matching", "loss/contrastive")}
        return found | self.contrastive.figures(sums, count)


def build_matching(recipe: Recipe, architecture: Architecture, groups: Groups) -> MatchingTraining:
    """The stage of a recipe."""
    contrastive = build_contrastive(recipe, architecture, groups)
    look = HardNegatives(
        groups,
        contrastive.look_ahead,
        recipe.matching,
        recipe.train.seed,
        architecture.inputs.image_token_id,
        row_multiples(recipe),
    )
    return MatchingTraining(groups, look, contrastive)
