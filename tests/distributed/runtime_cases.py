"""What the pool runs for test_runtime.py."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megavlm.config.schema import Recipe
from megavlm.data.image_patches import normalised
from megavlm.data.packing import pad_to
from megavlm.data.sample import Batch
from megavlm.errors import RunError
from megavlm.pipeline.actions import Receive, Schedule
from megavlm.train.passes import run_schedule
from megavlm.train.pipeline_work import Rows, run_chunk
from megavlm.train.scheduling import training_schedule
from megavlm.train.state import TrainState, build_state
from megavlm.train.step import load_rows


def _setup(recipe: Recipe, bucket_size: int | None) -> tuple[TrainState, Rows, Schedule]:
    state = build_state(recipe, bucket_size) if bucket_size else build_state(recipe)
    rows = load_rows(state, 0)
    if len(state.parts.chunks) > 1:  # Megatron-Core needs rows of one length there; other shapes round otherwise
        longest = max(len(batch.tokens_T) for batch in rows.batches)
        rows = Rows([pad_to(batch, longest) for batch in rows.batches], rows.patches, rows.shares)
    return state, rows, training_schedule(state.layout, state.inputs(0), state.costs)


def _gradients(state: TrainState) -> list[torch.Tensor]:
    parameters = [p for model in state.models for p in model.parameters() if p.requires_grad]
    found = [vars(parameter)["main_grad"].clone() for parameter in parameters]
    for chunk in state.parts.wrapped:
        chunk.zero_grad_buffer()
    return found


def _by_megatron(state: TrainState, rows: Rows, on_output: Any) -> list[Any]:
    """The same microbatches through Megatron-Core's own schedules, the encoder inside the first stage's forward."""
    parts = state.parts
    interleaved = len(parts.chunks) > 1
    parts.config.variable_seq_lengths = not interleaved
    # Measured with megatron-core 0.16.1 on gloo: batched p2p with overlap off swaps messages under PP2 x VPP2, and
    # freeing outputs corrupts tensors that are still being sent.
    parts.config.overlap_p2p_comm, parts.config.batch_p2p_comm = interleaved, not interleaved
    parts.config.no_sync_func = [chunk.no_sync for chunk in parts.chunks] if interleaved else parts.chunks[0].no_sync

    def forward_step(iterator: Iterator[tuple[Batch, Any]], wrapped: Any) -> tuple[torch.Tensor, Any]:
        batch, pixels = next(iterator)
        model = parts.models[parts.chunks.index(wrapped)]
        features_VKH = None
        if model.pre_process and len(batch.grid_thw_N3):
            with parts.encoder_chunk.no_sync():
                features_VKH = parts.encoder_chunk(normalised(pixels), batch.grid_thw_N3)
        output = run_chunk(wrapped, batch, features_VKH, parts.device)
        missing = 0 if model.post_process or not interleaved else model.num_slots - output.shape[1]
        if missing:  # received into tensors of one fixed shape
            output = torch.cat((output, output.new_zeros(len(output), missing, output.shape[2])), dim=1)
        return output, partial(lambda logits, batch: on_output(logits, batch), batch=batch)

    pairs = list(zip(rows.batches, rows.patches, strict=True))
    iterators = [iter(pairs) for _ in parts.chunks]
    parts.config.finalize_model_grads_func = lambda *_args, **_options: parts.reduce_gradients()
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if interleaved else iterators[0],
        model=list(parts.chunks) if interleaved else parts.chunks[0],
        num_microbatches=len(pairs),
        seq_length=len(rows.batches[0].tokens_T),
        # Hidden states between stages are [tokens, slots, hidden]: the batch axis carries the slots.
        micro_batch_size=parts.models[0].num_slots,
        forward_only=False,
    )
    return list(results or [])


def both_ways(recipe: Recipe, bucket_size: int | None = None) -> tuple[list[float], list[float], list[bool], int]:
    """Losses by Megatron-Core's schedule and by the runtime, whether each gradient is the same, and num of events."""
    state, rows, schedule = _setup(recipe, bucket_size)

    def on_output(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, float]:
        loss_sum, count, _ = state.stage.loss(logits, batch)
        return loss_sum, count.to(torch.int), float(loss_sum.detach())

    for chunk in state.parts.wrapped:
        chunk.zero_grad_buffer()
    theirs = _by_megatron(state, rows, on_output)
    expected = _gradients(state)
    ours, events = run_schedule(state, schedule, rows, on_output, record=True)
    state.parts.reduce_gradients()
    same = [torch.equal(a, b) for a, b in zip(expected, _gradients(state), strict=True)]
    assert any(bool(gradient.abs().max() > 0) for gradient in expected)
    return theirs, ours, same, len(events)


def lost_message(recipe: Recipe) -> str:
    """Rank 0 sends nothing; what rank 1 says."""
    state, rows, schedule = _setup(recipe, None)
    if state.groups.pipeline.rank() == 0:
        return ""
    assert isinstance(schedule.actions[1][0], Receive)
    try:
        run_schedule(state, schedule, rows, lambda logits, batch: (logits.sum(), logits.sum(), None))
    except RunError as error:
        return str(error)
    return "no error"
