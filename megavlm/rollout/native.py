"""Answers from the model as it stands, greedy or drawn, in whatever layout it is trained in.

Every new token costs a forward pass over the packed prompts (no key/value cache): meant for the few samples of a
report and for looking at a checkpoint, not for serving; export the model and use an inference engine for that.

Shape suffixes: T tokens of the packed row, L those of a context-parallel rank, W this rank's part of the vocabulary,
N answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megavlm.data.encode import SampleEncoder
from megavlm.data.packing import pack
from megavlm.data.pixels import load_sample_patches
from megavlm.data.sample import Batch, EncodedSample
from megavlm.data.token_weights import RESPONSE
from megavlm.parallel.context import zigzag_index
from megavlm.parallel.groups import Groups

RunForward = Callable[[Batch, Callable[[Any, Batch], torch.Tensor]], torch.Tensor | None]
"""Forward pass of one packed row: (row, what to do with the last stage's logits) to that result, None elsewhere."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        temperature: above 0; logits are divided by it.
        seeds: for each prompt the numbers that its draws come from, whatever else is answered beside it.
    """

    temperature: float
    seeds: Sequence[tuple[int, ...]]

    def noise(self, prompt: int, position: int, size: int) -> torch.Tensor:
        """Gumbel noise of a token's whole vocabulary, float32 [size], the same under every layout.

        The largest of logits with such noise is a draw from their softmax (Maddison et al., arXiv 1411.0030, 2).
        """
        mixed = np.random.SeedSequence([*self.seeds[prompt], position]).generate_state(2).tolist()
        generator = torch.Generator().manual_seed((mixed[0] << 31) ^ mixed[1])
        return -torch.empty(size).exponential_(generator=generator).clamp_(min=1e-37).log()


def greedy_answers(
    prompts: Sequence[EncodedSample],
    encoder: SampleEncoder,
    groups: Groups,
    run_forward: RunForward,
    sample_multiple: int,
    total_multiple: int,
    max_new_tokens: int,
) -> list[str]:
    """`answer_tokens`, the likeliest each, decoded without special tokens."""
    answers = answer_tokens(prompts, encoder, groups, run_forward, sample_multiple, total_multiple, max_new_tokens)
    return [encoder.tokenizer.decode(answer).strip() for answer in answers]


def answer_tokens(
    prompts: Sequence[EncodedSample],
    encoder: SampleEncoder,
    groups: Groups,
    run_forward: RunForward,
    sample_multiple: int,
    total_multiple: int,
    max_new_tokens: int,
    sampling: Sampling | None = None,
) -> list[list[int]]:
    """Answer prompts together, one packed row, until all have ended.

    Args:
        prompts: from `SampleEncoder.encode_prompt`.
        encoder: made them.
        groups: process groups; every rank calls this with the same prompts.
        run_forward: the pipeline's forward pass.
        sample_multiple: see `data.packing.pack`.
        total_multiple: see `data.packing.pack`.
        max_new_tokens: of each answer.
        sampling: how tokens are drawn; None: the likeliest is taken.

    Returns:
        The answers' tokens, that which ends one included, on every rank.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    open_ones = list(range(len(prompts)))
    pixels = {i: load_sample_patches(prompts[i], encoder) for i in open_ones}
    ends = set(encoder.tokenizer.eos_token_ids)
    for position in range(max_new_tokens):
        rows = [_extended(prompts[i], answers[i]) for i in open_ones]
        batch = pack(
            rows,
            [image for i in open_ones for image in pixels[i]],
            sample_multiple=sample_multiple,
            total_multiple=total_multiple,
            pad_token_id=encoder.tokenizer.pad_token_id,
            patch_channels=encoder.inputs.patch_channels,
        )
        starts = batch.cu_seqlens.tolist()
        last = torch.tensor([starts[n] + len(row.tokens_S) - 1 for n, row in enumerate(rows)])
        draw = None if sampling is None else _Draw(sampling, tuple(open_ones), position)
        chosen = _next_tokens(run_forward, batch, last, groups, draw, encoder.inputs.image_token_id)
        for i, token in zip(open_ones, chosen, strict=True):
            answers[i].append(token)
        open_ones = [i for i, token in zip(open_ones, chosen, strict=True) if token not in ends]
        if not open_ones:
            break
    return answers


def _extended(prompt: EncodedSample, answer: list[int]) -> EncodedSample:
    """The prompt with an answer so far; answers are text, whose positions count on from the largest."""
    if not answer:
        return prompt
    following = prompt.position_ids_3S.max() + 1 + np.arange(len(answer))
    return EncodedSample(
        sample_id=prompt.sample_id,
        tokens_S=np.concatenate((prompt.tokens_S, np.array(answer, dtype=np.int64))),
        token_classes_S=np.concatenate((prompt.token_classes_S, np.full(len(answer), RESPONSE, dtype=np.int8))),
        scales_S=np.concatenate((prompt.scales_S, np.ones(len(answer), dtype=np.float32))),
        position_ids_3S=np.concatenate((prompt.position_ids_3S, np.tile(following, (3, 1))), axis=1),
        images=prompt.images,
        grids_thw=prompt.grids_thw,
    )


@dataclass(frozen=True)
class _Draw:
    """How the next tokens of some prompts are drawn."""

    sampling: Sampling
    prompts: tuple[int, ...]
    position: int

    def __call__(self, logits_NW: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """With noise, of which a tensor rank has its part."""
        width = logits_NW.shape[1]
        noise = [self.sampling.noise(prompt, self.position, width * size) for prompt in self.prompts]
        noise_NW = torch.stack(noise)[:, rank * width : (rank + 1) * width].to(logits_NW.device)
        return logits_NW / self.sampling.temperature + noise_NW


def _next_tokens(
    run_forward: RunForward, batch: Batch, last: torch.Tensor, groups: Groups, draw: _Draw | None, image_token_id: int
) -> list[int]:
    """The likeliest, or a drawn, token after position `last[n]` of the packed row, for each n, on every rank.

    Never the placeholder of an image: there would be no image for it.
    """

    def choose(logits_LW: Any, batch: Batch) -> torch.Tensor:
        """`logits_LW` may be what logits are computed from: rows of it are logits."""
        context = groups.context
        positions_L = zigzag_index(batch.cu_seqlens, context.size(), context.rank()).to(logits_LW.device)
        where = torch.full((len(batch.tokens_T),), -1, device=logits_LW.device)
        where[positions_L] = torch.arange(len(positions_L), device=logits_LW.device)
        local = where[last.to(logits_LW.device)]
        mine = local >= 0
        rows = logits_LW[local.clamp(min=0)].float()
        column = image_token_id - groups.tensor.rank() * logits_LW.shape[1]
        if 0 <= column < logits_LW.shape[1]:
            rows[:, column] = float("-inf")
        if draw is not None:
            rows = draw(rows, groups.tensor.rank(), groups.tensor.size())
        best, index = rows.max(dim=1)
        index = index + groups.tensor.rank() * logits_LW.shape[1]
        best = best.masked_fill(~mine, float("-inf"))
        return _argmax_over(best, index, groups.tensor, context)

    chosen: Any = run_forward(batch, choose)
    if chosen is None:
        chosen = torch.zeros(len(last), dtype=torch.int64, device=torch.cuda.current_device())
    # Every pipeline has the same rows; ranks that only encode are in none. The last rank is on a last stage.
    dist.broadcast(chosen, src=dist.get_world_size() - 1)
    return [int(token) for token in chosen]


def _argmax_over(best: torch.Tensor, index: torch.Tensor, *groups: dist.ProcessGroup) -> torch.Tensor:
    """Index of the largest value over the ranks of several groups; the lower index wins a tie."""
    for group in groups:
        if group.size() == 1:
            continue
        values = [torch.empty_like(best) for _ in range(group.size())]
        indices = [torch.empty_like(index) for _ in range(group.size())]
        dist.all_gather(values, best, group=group)
        dist.all_gather(indices, index, group=group)
        stacked = torch.stack(values)
        best, winner = stacked.max(dim=0)
        index = torch.stack(indices).gather(0, winner[None])[0]
    return index
