"""What a stage wants to know of the whole global batch before its step.

Forward passes without gradients, of the model as it is or without its adapters, and sums over the rows themselves.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import torch

from megavlm.data.dataset import Dataset
from megavlm.data.sample import Batch
from megavlm.losses.reduce import global_sums
from megavlm.peft.attach import adapters_disabled
from megavlm.train.passes import not_training, run_schedule
from megavlm.train.pipeline_work import Rows
from megavlm.train.scheduling import evaluation_schedule
from megavlm.train.stages.preference import answer_logprobs
from megavlm.train.stages.sequences import counting_samples
from megavlm.train.state import TrainState


def rows_with_all(state: TrainState, rows: Rows, training: bool) -> Rows:
    """The rows with all that the stage wants to know of them; every rank calls this.

    Args:
        state: the run.
        rows: of a step, or of an evaluation.
        training: which of both.
    """
    dataset = state.train_set if training else state.eval_set
    assert dataset is not None
    return _take_census(state, _look_ahead(state, _with_references(state, rows), dataset), training)


def _with_references(state: TrainState, rows: Rows) -> Rows:
    """The rows with what the model says of their sequences without its adapters, where that is the reference.

    What is said is known, and read, on the last pipeline stage.
    """
    if state.recipe.preference.reference != "adapter_off":
        return rows

    def on_output(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sums_Q = answer_logprobs(logits, batch, state.groups)
        return sums_Q.sum(), torch.ones((), dtype=torch.int), sums_Q.view(-1, batch.num_parts).cpu()

    with not_training(state), adapters_disabled(state.models):
        said, _ = run_schedule(state, evaluation_schedule(state.layout, len(rows.batches)), rows, on_output)
    if not said:
        return rows
    batches = [
        dataclasses.replace(batch, references_NQ=references_NQ)
        for batch, references_NQ in zip(rows.batches, said, strict=True)
    ]
    return Rows(batches, rows.patches, rows.shares)


def _look_ahead(state: TrainState, rows: Rows, dataset: Dataset) -> Rows:
    """The rows with what the stage wants to know of them all before their step; without such a stage as they are."""
    look = state.stage.look_ahead
    if look is None:
        return rows
    batches, num_samples = _numbered(state, rows.batches)
    local = look.new_sums(num_samples, state.device)

    def on_output(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, None]:
        look.add(local, logits, batch)
        return logits.new_zeros(()), torch.ones((), dtype=torch.int), None

    read = Rows([look.read(batch) for batch in batches], rows.patches, rows.shares)
    with not_training(state):
        run_schedule(state, evaluation_schedule(state.layout, len(rows.batches)), read, on_output)
    ahead = look.result(global_sums(local, state.groups.speaks))
    left = [dataclasses.replace(look.remaining(batch, ahead, dataset), ahead=ahead) for batch in batches]
    return Rows(left, rows.patches, rows.shares)


def _take_census(state: TrainState, rows: Rows, training: bool) -> Rows:
    """The rows with what the stage wants to know of them all; without such a stage as they are."""
    census, place = state.stage.census, state.groups.place
    if census is None:
        return rows
    local = sum((census.sums(batch) for batch in rows.batches), torch.zeros(census.num_sums, dtype=torch.float64))
    counts = state.groups.speaks and place is not None and place.context == 0
    ahead = census.result(global_sums(local.to(state.device), counts).cpu(), training)
    batches = [dataclasses.replace(batch, ahead=ahead) for batch in rows.batches]
    return dataclasses.replace(rows, batches=batches)


def _numbered(state: TrainState, batches: Sequence[Batch]) -> tuple[list[Batch], int]:
    """The rows with the numbers of their samples in the global batch, and how many samples it has.

    Those of a data rank follow one another; only ranks that compute the loss need theirs.
    """
    place, counts = state.groups.place, [len(counting_samples(batch)) for batch in batches]
    everyones_D = torch.zeros(state.groups.topology.data, dtype=torch.float64, device=state.device)
    if place is not None:
        everyones_D[place.data] = sum(counts)
    speaks = state.groups.speaks and state.groups.context.rank() == 0
    everyones = global_sums(everyones_D, speaks).long().tolist()
    first = sum(everyones[: place.data]) if place is not None else 0
    firsts = itertools.accumulate(counts, initial=first)
    return [
        dataclasses.replace(batch, first_number=number) for batch, number in zip(batches, firsts, strict=False)
    ], sum(everyones)
