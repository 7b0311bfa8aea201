"""The phases of a round that need a model: answers to its questions, and their rewards."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from megavlm.checkpoint.hf_io import HFDirectory
from megavlm.checkpoint.hf_load import load_weights
from megavlm.config.numerics import compute_dtype
from megavlm.config.schema import Recipe
from megavlm.data.encode import TooLong
from megavlm.data.packing import pack
from megavlm.data.pixels import load_sample_patches
from megavlm.data.sample import Sample
from megavlm.errors import use_error
from megavlm.rollout.native import Sampling
from megavlm.train.answers import answer_prompts
from megavlm.train.datasets import build_dataset, build_encoder, encoder_of
from megavlm.train.kept import Answered, exact_rewards, with_answer
from megavlm.train.rounds import Round, keep, read_answered, write_answered
from megavlm.train.single import SingleModel, build_single
from megavlm.train.stages.reward import answer_scores
from megavlm.train.state import TrainState, build_state, is_main_rank

logger = logging.getLogger(__name__)


def sample_round(this: Round) -> None:
    """Answer a round's questions, in the layout of training; every rank calls this."""
    state = build_state(this.answering)
    knobs, whole = this.recipe.iterate, [row for row in range(len(state.train_set)) if not state.train_set.is_cut(row)]
    rows = _drawn(whole, knobs.num_rows, (this.recipe.train.seed, this.number))
    wanted = [(row, number) for row in rows for number in range(knobs.num_generations)]
    answers: dict[int, list[str | None]] = {row: [] for row in rows}
    for start in range(0, len(wanted), knobs.generation_batch_size):
        part = wanted[start : start + knobs.generation_batch_size]
        for (row, _number), text in zip(part, _answer(state, this, part), strict=True):
            answers[row].append(text)
        logger.info("round %d: %d of %d answers", this.number, min(start + len(part), len(wanted)), len(wanted))
    if is_main_rank():
        write_answered(this.answers, [Answered(row, tuple(texts)) for row, texts in answers.items()])
    dist.barrier()


def _drawn(rows: Sequence[int], number: int, seeds: tuple[int, ...]) -> list[int]:
    if not number or number >= len(rows):
        return list(rows)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seeds)))
    return sorted(int(row) for row in generator.choice(np.array(rows), number, replace=False))


def _answer(state: TrainState, this: Round, part: Sequence[tuple[int, int]]) -> list[str | None]:
    knobs, encoder = this.recipe.iterate, state.train_set.encoder
    prompts = [encoder.encode_prompt(state.train_set.sample(row)) for row, _number in part]
    sampling = None
    if knobs.temperature:
        seeds = [(this.recipe.train.seed, this.number, row, number) for row, number in part]
        sampling = Sampling(knobs.temperature, seeds)
    ends = set(encoder.tokenizer.eos_token_ids)
    found = []
    for tokens in answer_prompts(state, prompts, knobs.max_completion_length, sampling):
        text = encoder.tokenizer.decode(tokens).strip()
        found.append(text if text and tokens[-1] in ends else None)
    return found


def score_round(this: Round) -> None:
    """Give a round's answers their rewards, and write down what is learned; one process.

    Raises:
        RunError: nothing is learned.
        UseError: the answers are not those of the rows, or the reward model is none.
    """
    answered = read_answered(this.answers)
    recipe, knobs = this.answering, this.recipe.iterate
    directory = HFDirectory(this.model_dir)
    dataset = build_dataset(recipe.data.train, recipe, build_encoder(recipe, directory))
    outside = [one.row for one in answered if not 0 <= one.row < len(dataset)]
    if outside:
        raise use_error(str(this.answers), f"row {outside[0]}", f"rows from 0 to {len(dataset) - 1}", "write it anew")
    samples = {one.row: dataset.sample(one.row) for one in answered}
    judge = _Judge(recipe, knobs.reward_model) if knobs.reward == "reward_model" else None
    scored = []
    for one in answered:
        sample = samples[one.row]
        rewards = exact_rewards(sample, one.answers) if judge is None else judge.rewards(sample, one.answers)
        scored.append(Answered(one.row, one.answers, rewards))
    summary = keep(this, samples, scored)
    logger.info("round %d: %s", this.number, summary)


class _Judge:
    """A reward model in this process."""

    def __init__(self, recipe: Recipe, hf_dir: str) -> None:
        directory = HFDirectory(hf_dir)
        if not directory.architecture.language.has_score_head:
            raise use_error("iterate.reward_model", hf_dir, "a model that ends in a score", "train one (stage rm)")
        model = dataclasses.replace(recipe.model, hf_dir=hf_dir)
        self._encoder = encoder_of(dataclasses.replace(recipe, model=model), directory.architecture.inputs)
        self._model: SingleModel = build_single(directory, compute_dtype(recipe))
        load_weights(directory, self._model.parts)

    @torch.no_grad()
    def rewards(self, sample: Sample, answers: Sequence[str | None]) -> tuple[float | None, ...]:
        """The score of the conversation with each answer: that of its last token."""
        return tuple(None if answer is None else self._score(with_answer(sample, answer)) for answer in answers)

    def _score(self, sample: Sample) -> float | None:
        try:
            row = self._encoder.encode(sample)
        except TooLong:
            return None
        batch = pack(
            [row],
            load_sample_patches(row, self._encoder),
            sample_multiple=1,
            total_multiple=1,
            pad_token_id=self._encoder.tokenizer.pad_token_id,
            patch_channels=self._encoder.inputs.patch_channels,
        )
        scores_L1 = self._model.logits(batch, torch.device(torch.cuda.current_device()))
        return float(answer_scores(scores_L1, batch, self._model.groups, "last_token"))
