"""What the pool runs for test_runtime.py."""

from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads

from megavlm.config.schema import Recipe
from megavlm.data.packing import pad_to
from megavlm.data.sample import Batch
from megavlm.errors import RunError
from megavlm.pipeline.actions import Receive, Schedule
from megavlm.pipeline.exchange import Exchange, make_payload_groups
from megavlm.pipeline.schedules import interleaved
from megavlm.train.pipeline_work import run_by_runtime
from megavlm.train.state import TrainState, build_state
from megavlm.train.step import run_schedule


def _setup(recipe: Recipe, bucket_size: int | None) -> tuple[TrainState, list[Batch], Exchange, Schedule]:
    state = build_state(recipe, bucket_size) if bucket_size else build_state(recipe)
    state.config.finalize_model_grads_func = finalize_model_grads
    groups = make_payload_groups(state.groups.pipeline, ("activation", "gradient"))
    exchange = Exchange(groups, state.config.params_dtype, state.device, timeout_s=20)
    batches = list(state.loader.batches(0))
    if len(state.chunks) > 1:  # Megatron-Core needs rows of one length there; other shapes round otherwise
        longest = max(len(batch.tokens_T) for batch in batches)
        batches = [pad_to(batch, longest) for batch in batches]
    return state, batches, exchange, interleaved(state.groups.pipeline.size(), len(state.chunks), len(batches))


def _gradients(state: TrainState) -> list[torch.Tensor]:
    parameters = [p for model in state.models for p in model.parameters() if p.requires_grad]
    found = [vars(parameter)["main_grad"].clone() for parameter in parameters]
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    return found


def both_ways(recipe: Recipe, bucket_size: int | None = None) -> tuple[list[float], list[float], list[bool], int]:
    """Losses by Megatron-Core's schedule and by the runtime, whether each gradient is the same, and num of events."""
    state, batches, exchange, schedule = _setup(recipe, bucket_size)

    def on_output(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, float]:
        loss_sum, count, _ = state.stage.loss(logits, batch)
        return loss_sum, count.to(torch.int), float(loss_sum.detach())

    for chunk in state.chunks:
        chunk.zero_grad_buffer()

    def per_token_off(chunks: Any, _count: Any = None, **options: Any) -> None:
        finalize_model_grads(chunks, None, **options)  # sums, as the runtime leaves them

    state.config.finalize_model_grads_func = per_token_off
    theirs = run_schedule(state, batches, on_output, forward_only=False)
    expected = _gradients(state)
    ours, events = run_by_runtime(state, batches, on_output, schedule, exchange, record=True)
    same = [torch.equal(a, b) for a, b in zip(expected, _gradients(state), strict=True)]
    assert any(bool(gradient.abs().max() > 0) for gradient in expected)
    return theirs, ours, same, len(events)


def lost_message(recipe: Recipe) -> str:
    """Rank 0 skips its first send; what rank 1 says."""
    state, batches, exchange, schedule = _setup(recipe, None)
    exchange = Exchange(exchange._groups, state.config.params_dtype, state.device, timeout_s=2)
    if state.groups.pipeline.rank() == 0:
        return ""
    assert isinstance(schedule.actions[1][0], Receive)
    try:
        run_by_runtime(state, batches, lambda logits, batch: (logits.sum(), logits.sum(), None), schedule, exchange)
    except RunError as error:
        return str(error)
    return "no error"
