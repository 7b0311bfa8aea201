"""The report's samples: held-out questions answered before and after training."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megavlm.config.numerics import row_multiples
from megavlm.data.media import shown_file
from megavlm.data.readers import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from megavlm.data.sample import Batch, EncodedSample, Sample
from megavlm.losses.masks import words_of
from megavlm.rollout.native import Sampling, answer_tokens
from megavlm.train.passes import run_schedule
from megavlm.train.pipeline_work import Rows
from megavlm.train.scheduling import evaluation_schedule
from megavlm.train.shares import StepShares, share_step
from megavlm.train.stages.registry import STAGES
from megavlm.train.state import TrainState

SAMPLES_NAME = "samples.json"


def answer(state: TrainState, samples: list[Sample]) -> list[str]:
    """Greedy answers of the model as it stands; every rank calls this."""
    encoder = state.train_set.encoder
    prompts = [encoder.encode_prompt(sample) for sample in samples]
    answers = answer_prompts(state, prompts, state.recipe.observe.report_max_new_tokens)
    return [encoder.tokenizer.decode(tokens).strip() for tokens in answers]


@torch.no_grad()
def answer_prompts(
    state: TrainState, prompts: Sequence[EncodedSample], max_new_tokens: int, sampling: Sampling | None = None
) -> list[list[int]]:
    """Tokens of the answers of the model as it stands (see `rollout.native.answer_tokens`); every rank calls this."""
    topology = state.groups.topology
    sample_multiple, total_multiple = row_multiples(state.recipe)

    def run_forward(batch: Batch, choose: Callable[[torch.Tensor, Batch], torch.Tensor]) -> torch.Tensor | None:
        def on_output(logits: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            words: Any = words_of(logits)
            return torch.zeros(()), torch.ones((), dtype=torch.int), choose(words, batch)

        # Every pipeline answers the same prompts.
        grids = [tuple(grid) for grid in batch.grid_thw_N3.tolist()]
        shares = share_step(topology, [{data: grids for data in range(topology.data)}], state.costs.encode)
        rows = Rows([batch], [_own_patches(state, batch, shares)], shares)
        results, _ = run_schedule(state, evaluation_schedule(state.layout, 1), rows, on_output)
        return results[0] if results else None

    state.set_training(False)
    answers = answer_tokens(
        prompts,
        state.train_set.encoder,
        state.groups,
        run_forward,
        sample_multiple,
        total_multiple,
        max_new_tokens,
        sampling,
    )
    state.set_training(True)
    return answers


def _own_patches(state: TrainState, batch: Batch, shares: StepShares) -> torch.Tensor:
    """Patches of the images that this rank encodes, out of those of the whole row."""
    part = state.groups.topology.replica_of(state.parts.rank)
    if part is None:
        return batch.patches_PC[:0]
    by_image = batch.patches_PC.split(batch.grid_thw_N3[:, :3].prod(1).tolist())  # of tiles there are more numbers
    wanted = [by_image[key.number] for key in shares.microbatches[0].images_of(part[0].number)]
    return torch.cat(wanted) if wanted else batch.patches_PC[:0]


def report_samples(state: TrainState) -> list[Sample]:
    """The held-out samples that the report shows: spread evenly over the held-out rows."""
    number = state.recipe.observe.num_report_samples
    has_words = STAGES[state.recipe.train.stage].head == "words"
    if not state.recipe.observe.report or state.eval_set is None or not number or not has_words:
        return []
    # A row that was cut may be too long as a question, too.
    whole = [index for index in range(len(state.eval_set)) if not state.eval_set.is_cut(index)]
    total = len(whole)
    return [state.eval_set.sample(whole[index * total // number]) for index in range(min(number, total))]


def write_samples(path: Path, samples: list[Sample], before: list[str] | None, after: list[str] | None) -> None:
    """Write samples.json, what report.html draws its gallery from. Image paths are relative to it."""
    rows = []
    for number, sample in enumerate(samples):
        question = [turn.text for turn in sample.turns if turn.role != "assistant"][-1]
        rows.append(
            {
                "id": sample.sample_id,
                "images": [
                    shown_file(image, path.parent, f"sample_images/{number}_{place}")
                    for place, image in enumerate(sample.images)
                ],
                "question": question.replace(IMAGE_PLACEHOLDER, "").replace(VIDEO_PLACEHOLDER, "").strip(),
                "truth": sample.turns[-1].text,
                "before": before[number] if before else None,
                "after": after[number] if after else None,
                "task": sample.extra.get("task", ""),
            }
        )
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")


def read_before(path: Path) -> list[str] | None:
    """Answers that an earlier attempt of the run gave before training, if it got that far."""
    if not path.is_file():
        return None
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    answers = [row["before"] for row in rows]
    return None if any(text is None for text in answers) else answers
