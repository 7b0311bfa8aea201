"""One optimizer step, and one forward-only pass, through Megatron-Core's pipeline schedules.

Stages return sums and counts; the only division is by the count of the whole global batch.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megavlm.data.packing import pad_to
from megavlm.data.sample import Batch
from megavlm.errors import RunError
from megavlm.losses.reduce import global_sums
from megavlm.models.names import named_parameters
from megavlm.models.vlm import VisionLanguageModel
from megavlm.train.optim import GradientNorms, clip_and_update, gradient_norms
from megavlm.train.state import TrainState


@dataclass
class Tally:
    """What this rank's microbatches of a step add up to; filled on the last pipeline stage."""

    sums: list[torch.Tensor] = field(default_factory=list)
    counts: list[torch.Tensor] = field(default_factory=list)
    sample_ids: list[tuple[str, ...]] = field(default_factory=list)
    num_tokens: int = 0
    num_images: int = 0


@dataclass(frozen=True)
class StepResult:
    """Figures of a step over all ranks."""

    loss: float
    count: float
    num_tokens: int
    num_images: int
    norms: GradientNorms


def run_batch(model: VisionLanguageModel, wrapped: torch.nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
    """One forward pass of a model chunk on a packed row."""
    needs_patches = model.pre_process
    patches_PC = batch.patches_PC if needs_patches else batch.patches_PC[:0]
    return wrapped(
        patches_PC.to(device, non_blocking=True),
        batch.tokens_T.to(device, non_blocking=True),
        batch.position_ids_3T.to(device, non_blocking=True),
        batch.cu_seqlens.to(device, non_blocking=True),
        batch.grid_thw_N3.to(device, non_blocking=True),
    )


def run_schedule(
    state: TrainState,
    batches: Sequence[Batch],
    on_output: Callable[[torch.Tensor, Batch], tuple[torch.Tensor, torch.Tensor, Any]],
    forward_only: bool,
) -> list[Any]:
    """Drive all microbatches through the pipeline.

    Args:
        state: the model, wrapped.
        batches: this data rank's microbatches, the same on all ranks of its pipeline.
        on_output: on the last stage, (logits, batch) to (sum, count, anything); the sum is what is differentiated.
        forward_only: no backward pass.

    Returns:
        The third results, on the last stage.
    """
    if state.config.virtual_pipeline_model_parallel_size:
        longest = max(len(batch.tokens_T) for batch in batches)
        batches = [pad_to(batch, longest) for batch in batches]

    def forward_step(iterator: Iterator[Batch], wrapped: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = next(iterator)
        model = state.model_of(wrapped)
        output = run_batch(model, wrapped, batch, state.device)
        return output, functools.partial(lambda logits, batch: on_output(logits, batch), batch=batch)

    iterators = [iter(batches) for _ in state.chunks]
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=state.chunks if len(state.chunks) > 1 else state.chunks[0],
        num_microbatches=len(batches),
        seq_length=len(batches[0].tokens_T),
        # Hidden states between stages are [tokens, slots, hidden]: the batch axis carries the slots.
        micro_batch_size=state.models[0].num_slots,
        forward_only=forward_only,
    )
    return list(results or [])


def train_step(state: TrainState, step: int) -> StepResult:
    """Forward, backward and update on the global batch of `step` (from 0).

    Raises:
        RunError: loss or gradient is not finite, or the global batch has nothing to learn.
    """
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    batches = list(state.loader.batches(step))
    tally = Tally(
        num_tokens=sum(batch.num_real_tokens for batch in batches),
        num_images=sum(len(batch.grid_thw_N3) for batch in batches),
    )
    totals: dict[str, torch.Tensor] = {}

    def on_output(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, None]:
        loss_sum, count, _metrics = state.stage.loss(logits, batch)
        tally.sums.append(loss_sum.detach())
        tally.counts.append(count.detach())
        tally.sample_ids.append(batch.sample_ids)
        return loss_sum, count.to(torch.int), None

    def finalize(chunks: list[Any], _num_tokens: torch.Tensor | None = None, **options: Any) -> None:
        """Reduce gradients over ranks, then divide by the global count (Megatron-Core's own counts in integers)."""
        finalize_model_grads(chunks, None, **options)
        totals["sums"] = _reduce(state, tally, step)
        for chunk in chunks:
            chunk.scale_gradients(float(1.0 / totals["sums"][1]))

    state.config.finalize_model_grads_func = finalize
    run_schedule(state, batches, on_output, forward_only=False)
    loss_sum, count, num_tokens, num_images = totals["sums"].tolist()
    norms = _checked_norms(state, step, list(itertools.chain(*(batch.sample_ids for batch in batches))))
    clip_and_update(state.optimizer, norms, state.recipe.optimizer.clip_grad)
    state.scheduler.step(increment=1)
    context = state.groups.context.size()
    return StepResult(loss_sum / count, count, round(num_tokens / context), round(num_images / context), norms)


def _reduce(state: TrainState, tally: Tally, step: int) -> torch.Tensor:
    """[loss sum, count, tokens, images] over all ranks; tokens and images are counted once per context rank."""
    local = torch.zeros(4, dtype=torch.float64, device=state.device)
    if state.is_last_stage:
        sums, counts = torch.stack(tally.sums).double(), torch.stack(tally.counts).double()
        broken = [ids for ids, value in zip(tally.sample_ids, sums.tolist(), strict=True) if not _finite(value)]
        if broken:
            ids = ", ".join(itertools.chain(*broken))
            raise RunError(f"step {step + 1}, rank {dist.get_rank()}: loss is not finite on sample(s) {ids}")
        local = torch.stack(
            (sums.sum(), counts.sum(), sums.new_tensor(tally.num_tokens), sums.new_tensor(tally.num_images))
        )
    total = global_sums(local, state.groups.data_context, state.groups.pipeline, state.is_last_stage)
    if not total[1] > 0:
        raise RunError(f"step {step + 1}: no token of the global batch has a weight: nothing to learn")
    return total


def _finite(value: float) -> bool:
    return value - value == 0.0


def _checked_norms(state: TrainState, step: int, sample_ids: list[str]) -> GradientNorms:
    state.optimizer.prepare_grads()
    norms = gradient_norms(state.optimizer, state.learning_components)
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


@torch.no_grad()
def evaluate(state: TrainState) -> dict[str, float]:
    """Mean loss on the held-out rows, over all ranks."""
    assert state.eval_set is not None
    multiple = state.groups.pipeline.size() if state.config.virtual_pipeline_model_parallel_size else 1
    batches = list(
        state.loader.eval_batches(state.eval_set, max_rounds=state.recipe.train.eval_iters, rounds_multiple=multiple)
    )
    local = torch.zeros(2, dtype=torch.float64, device=state.device)

    def on_output(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, None]:
        loss_sum, count, _metrics = state.stage.loss(logits, batch)
        local.add_(torch.stack((loss_sum.double(), count.double())))
        return loss_sum, count.to(torch.int), None

    state.set_training(False)
    run_schedule(state, batches, on_output, forward_only=True)
    state.set_training(True)
    loss_sum, count = global_sums(local, state.groups.data_context, state.groups.pipeline, state.is_last_stage).tolist()
    return {"loss": loss_sum / count, "num_tokens": count}
