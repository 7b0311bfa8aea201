"""One optimizer step, and one forward-only pass, through the pipeline runtime.

Stages return sums and counts; the only division is by the count of the whole global batch.
"""

import itertools
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megavlm.data.loader import evaluation_rows
from megavlm.data.sample import Batch
from megavlm.errors import RunError
from megavlm.losses.reduce import global_sums
from megavlm.models.names import named_parameters
from megavlm.pipeline.actions import Schedule
from megavlm.pipeline.runtime import Event
from megavlm.train import balance
from megavlm.train.ahead import rows_with_all
from megavlm.train.inputs import StepInputs, step_inputs
from megavlm.train.learning import hide_gradients
from megavlm.train.loss_scale import prepare_gradients, scaler_of
from megavlm.train.optim import GradientNorms, clip_and_update, gradient_norms
from megavlm.train.passes import run_schedule
from megavlm.train.pipeline_work import Rows
from megavlm.train.scheduling import evaluation_schedule, training_schedule
from megavlm.train.shared_gradients import shared_gradients
from megavlm.train.stages.stage import Stage, Sums
from megavlm.train.state import TrainState


@dataclass
class Tally:
    """What this rank's microbatches of a step add up to; filled on the last pipeline stage."""

    sums: list[torch.Tensor] = field(default_factory=list)
    counts: list[torch.Tensor] = field(default_factory=list)
    metrics: list[torch.Tensor] = field(default_factory=list)
    """What the stage adds up beside the loss, one vector each."""
    sample_ids: list[tuple[str, ...]] = field(default_factory=list)
    num_tokens: int = 0
    num_images: int = 0
    num_padded_tokens: int = 0
    """Tokens with those of the padding."""


@dataclass(frozen=True)
class StepResult:
    """Figures of a step over all ranks."""

    loss: float
    count: float
    num_tokens: int
    num_images: int
    norms: GradientNorms
    pad_share: float
    """Padding tokens over all tokens of the packed rows."""
    data_wait_s: float = 0.0
    """How long this rank waited for its microbatches."""
    figures: dict[str, float] = field(default_factory=dict)
    """Of the stage, beside the loss."""
    loss_scale: float | None = None
    """Of fp16: what the loss was multiplied by."""
    skipped: bool = False
    """Gradients have overflown: nothing was learned, and norms are 0."""
    load_balancing_loss: float | None = None
    """Of models with experts, when it is learned: mean over tokens and layers; 1 where all are chosen alike."""


@dataclass(frozen=True)
class Recording:
    """What a rank did in a step.

    Attributes:
        schedule: that it executed.
        inputs: of the step.
        events: in seconds since the schedule began; all ranks began together.
        reduce_s: the reduction of gradients behind it.
        pad_share: padding tokens over all tokens of its rows.
    """

    schedule: Schedule
    inputs: StepInputs
    events: list[Event]
    reduce_s: float
    pad_share: float


def load_rows(state: TrainState, step: int) -> Rows:
    """Load what this rank needs for a step."""
    loaded = list(state.loader.batches(step))
    return Rows([one.batch for one in loaded], [one.pixels for one in loaded], state.inputs(step).shares)


def train_step(state: TrainState, step: int, recordings: list[Recording] | None = None) -> StepResult:
    """Forward, backward and update on the global batch of `step` (from 0).

    Args:
        state: the run.
        step: from 0.
        recordings: when given, what this rank did is timed, and appended.

    Raises:
        RunError: loss or gradient is not finite, or the global batch has nothing to learn.
    """
    for chunk in state.parts.wrapped:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    waits_since_s = time.perf_counter()
    rows = load_rows(state, step)
    data_wait_s = time.perf_counter() - waits_since_s
    rows = rows_with_all(state, rows, training=True)
    shared = shared_gradients(state)
    tally = Tally(
        num_tokens=sum(batch.num_real_tokens for batch in rows.batches),
        num_images=sum(len(batch.grid_thw_N3) for batch in rows.batches),
        num_padded_tokens=sum(len(batch.tokens_T) for batch in rows.batches),
    )

    def on_output(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, None]:
        if shared is not None:
            shared.watch(batch)
        loss_sum, count, metrics = state.stage.loss(logits, batch)
        tally.sums.append(loss_sum.detach())
        tally.counts.append(count.detach())
        tally.metrics.append(_joined(state.stage, metrics, loss_sum.device))
        tally.sample_ids.append(batch.sample_ids)
        return loss_sum, count.to(torch.int), None

    balances = state.recipe.model.moe_aux_loss_coeff > 0
    expected_count = balance.prepare(state, rows.batches) if balances else None
    inputs = state.inputs(step)
    schedule = training_schedule(state.layout, inputs, state.costs)
    _, events = run_schedule(state, schedule, rows, on_output, record=recordings is not None)
    started_s = time.perf_counter()
    state.parts.reduce_gradients()
    if recordings is not None:
        torch.cuda.synchronize()
        num_tokens = sum(len(batch.tokens_T) for batch in rows.batches)
        pad_share = 1 - sum(batch.num_real_tokens for batch in rows.batches) / num_tokens
        recordings.append(Recording(schedule, inputs, events, time.perf_counter() - started_s, pad_share))
    totals, metrics = _reduce(state, tally, step)
    state.parts.scale_gradients(float(1.0 / totals[1]))
    loss_sum, count, num_tokens, num_images, num_padded_tokens = totals.tolist()
    assert expected_count is None or math.isclose(count, expected_count, rel_tol=1e-3), (count, expected_count)
    scaler = scaler_of(state.optimizer)
    loss_scale = None if scaler is None else float(scaler.scale)
    norms, skipped = _update(state, step, rows)
    sums = dict(_split(state.stage, metrics))
    if shared is not None:
        sums["gradient_norms"] = shared.finish(count * (loss_scale or 1.0))
    figures = state.stage.figures(sums, count)
    if state.stage.memory is not None and not skipped:
        state.stage.memory.take(sums, count)
    context = state.groups.topology.context
    return StepResult(
        loss=loss_sum / count,
        count=count,
        num_tokens=round(num_tokens / context),
        num_images=round(num_images / context),
        norms=norms,
        data_wait_s=data_wait_s,
        loss_scale=loss_scale,
        skipped=skipped,
        pad_share=1 - num_tokens / num_padded_tokens,
        figures=figures,
        load_balancing_loss=balance.measure(state, rows.batches) if balances else None,
    )


def _update(state: TrainState, step: int, rows: Rows) -> tuple[GradientNorms, bool]:
    """Change the weights by their gradients; (norms, whether gradients have overflown and nothing was changed)."""
    hide_gradients(state.learning, step)
    skipped = prepare_gradients(state.optimizer)
    if skipped:
        norms = GradientNorms(0.0, dict.fromkeys(state.learning_components, 0.0))
        state.num_skipped += 1
    else:
        norms = _checked_norms(state, step, list(itertools.chain(*(batch.sample_ids for batch in rows.batches))))
        clip_and_update(state.optimizer, state.scheduler, state.learning, norms, step)
        state.count_update(step)
        state.parts.bound_weights()
        state.parts.weights_changed()
    if state.parts.fp8 is not None:
        state.parts.fp8.end_step()
    state.scheduler.step(increment=1)
    return norms, skipped


def _joined(stage: Stage, metrics: Sums, device: torch.device) -> torch.Tensor:
    """A stage's further sums as one float64 vector."""
    assert set(metrics) == set(stage.metric_sizes), (sorted(metrics), sorted(stage.metric_sizes))
    parts = [metrics[name].detach().double() for name in stage.metric_sizes]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=device)


def _split(stage: Stage, vector: torch.Tensor) -> Sums:
    """Back to the sums by name."""
    return dict(zip(stage.metric_sizes, vector.split(list(stage.metric_sizes.values())), strict=True))


def _reduce(state: TrainState, tally: Tally, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Over all ranks: [loss sum, count, tokens, images, tokens with padding], and the stage's further sums.

    Tokens and images are counted once per context rank.
    """
    num_metrics = sum(state.stage.metric_sizes.values())
    local = torch.zeros(5 + num_metrics, dtype=torch.float64, device=state.device)
    broken = ""
    if state.groups.is_last_stage:
        sums, counts = torch.stack(tally.sums).double(), torch.stack(tally.counts).double()
        ids = [ids for ids, value in zip(tally.sample_ids, sums.tolist(), strict=True) if not _finite(value)]
        if ids:
            samples = ", ".join(itertools.chain(*ids))
            broken = f"rank {dist.get_rank()}: loss is not finite on sample(s) {samples}"
        counted = (tally.num_tokens, tally.num_images, tally.num_padded_tokens)
        metrics = torch.stack(tally.metrics).sum(0)
        local = torch.cat((torch.stack((sums.sum(), counts.sum())), sums.new_tensor(counted), metrics))
    total = global_sums(local, state.groups.speaks)
    if not _finite(float(total[0])):
        # All ranks see it in the sum, and end together; only some know the samples.
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, broken)
        raise RunError(f"step {step + 1}, {next((text for text in everyones if text), 'the sum of losses overflows')}")
    if not total[1] > 0:
        raise RunError(f"step {step + 1}: no token of the global batch has a weight: nothing to learn")
    return total[:5], total[5:]


def _finite(value: float) -> bool:
    return value - value == 0.0


def _checked_norms(state: TrainState, step: int, sample_ids: list[str]) -> GradientNorms:
    norms = gradient_norms(state.optimizer, state.parts, state.learning, state.learning_components)
    if _finite(norms.total):
        return norms
    where = [
        f"{name} (rank {dist.get_rank()})"
        for model in state.models
        for name, parameter in named_parameters(model)
        if parameter.requires_grad and not bool(torch.isfinite(vars(parameter)["main_grad"]).all())
    ]
    # The norm is everybody's, so all ranks come here; only some hold the parameter at fault.
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, where[:1])
    seen = ", ".join(itertools.chain(*everyones)) or "no parameter: the sum overflows"
    groups = ", ".join(name for name, norm in norms.by_component.items() if not _finite(norm))
    raise RunError(
        f"step {step + 1}, rank {dist.get_rank()}: gradient of {groups} is not finite; "
        f"first seen in {seen}; samples: {', '.join(sample_ids)}"
    )


def evaluate(state: TrainState) -> dict[str, float]:
    """Mean loss on the held-out rows, over all ranks."""
    assert state.eval_set is not None
    topology, train = state.groups.topology, state.recipe.train
    rows_D = evaluation_rows(state.eval_set, train.micro_batch_size, topology.data, max_rounds=train.eval_iters)
    weights = state.token_schedule.last
    inputs = step_inputs(topology, state.parts.rank, state.eval_set, rows_D, state.costs, weights)
    loaded = list(state.loader.eval_batches(state.eval_set, inputs.orders))
    rows = Rows([one.batch for one in loaded], [one.pixels for one in loaded], inputs.shares)
    rows = rows_with_all(state, rows, training=False)
    local = torch.zeros(2 + sum(state.stage.metric_sizes.values()), dtype=torch.float64, device=state.device)

    def on_output(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, None]:
        loss_sum, count, metrics = state.stage.loss(logits, batch)
        both = torch.stack((loss_sum.double(), count.double()))
        local.add_(torch.cat((both, _joined(state.stage, metrics, local.device))))
        return loss_sum, count.to(torch.int), None

    state.set_training(False)
    run_schedule(state, evaluation_schedule(state.layout, len(loaded)), rows, on_output)
    state.set_training(True)
    totals = global_sums(local, state.groups.speaks)
    loss_sum, count = totals[:2].tolist()
    if not count > 0:
        raise RunError("no token of the held-out rows has a weight by data.token_weights, or by the last phase")
    figures = state.stage.figures(_split(state.stage, totals[2:]), count)
    return {"loss": loss_sum / count, "num_tokens": count} | figures
