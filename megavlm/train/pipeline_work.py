"""A rank's model chunks as the pieces that the pipeline runtime runs.

Shape suffixes: S tokens of this rank's sequence part, K slots, H hidden size (see models/vlm.py).
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from megavlm.data.sample import Batch
from megavlm.pipeline.actions import Compute, Message, Schedule
from megavlm.pipeline.exchange import Exchange
from megavlm.pipeline.runtime import Event, execute
from megavlm.train.state import TrainState
from megavlm.train.step import run_batch

OnOutput = Callable[[torch.Tensor, Batch], tuple[torch.Tensor, torch.Tensor, Any]]


class ChunkWork:
    """Forward and backward of this rank's chunks, one microbatch at a time; gradients add up in DDP's buffers.

    As in Megatron-Core, gradients are reduced over data ranks while the last backward pass of a chunk runs.
    """

    def __init__(self, state: TrainState, batches: Sequence[Batch], on_output: OnOutput) -> None:
        self._state, self._batches, self._on_output = state, batches, on_output
        self._inputs: dict[tuple[int, int], torch.Tensor | None] = {}
        self._outputs: dict[tuple[int, int], torch.Tensor] = {}
        self._backwards_left = [len(batches)] * len(state.chunks)
        self.results: list[Any] = []

    def run(self, compute: Compute, needs: Mapping[Message, torch.Tensor]) -> torch.Tensor | None:
        """Run an `F` or a `B`."""
        taken = next(iter(needs.values()), None)
        if compute.kind == "F":
            return self._forward(compute.microbatch, compute.chunk, taken)
        assert compute.kind == "B", f"{compute}: this model runs its encoder with its first stage"
        return self._backward(compute.microbatch, compute.chunk, taken)

    def _forward(self, microbatch: int, chunk: int, hidden_SKH: torch.Tensor | None) -> torch.Tensor:
        state, batch = self._state, self._batches[microbatch]
        if hidden_SKH is not None:
            hidden_SKH.requires_grad_()
        model, wrapped = state.models[chunk], state.chunks[chunk]
        model.set_input_tensor(hidden_SKH)
        with wrapped.no_sync():
            output = run_batch(model, wrapped, batch, state.device)
        if model.post_process:
            output, _count, result = self._on_output(output, batch)
            self.results.append(result)
        self._inputs[microbatch, chunk] = hidden_SKH
        self._outputs[microbatch, chunk] = output
        return output

    def _backward(self, microbatch: int, chunk: int, grad_SKH: torch.Tensor | None) -> torch.Tensor | None:
        hidden_SKH = self._inputs.pop((microbatch, chunk))
        output = self._outputs.pop((microbatch, chunk))
        if grad_SKH is None and self._state.config.grad_scale_func is not None:
            output = self._state.config.grad_scale_func(output)
        self._backwards_left[chunk] -= 1
        last = not self._backwards_left[chunk]
        with contextlib.nullcontext() if last else self._state.chunks[chunk].no_sync():
            torch.autograd.backward(output, grad_SKH)
        return None if hidden_SKH is None else hidden_SKH.grad


def run_by_runtime(
    state: TrainState,
    batches: Sequence[Batch],
    on_output: OnOutput,
    schedule: Schedule,
    exchange: Exchange,
    record: bool = False,
) -> tuple[list[Any], list[Event]]:
    """One step's forwards and backwards by our own runtime, then Megatron-Core's hook that reduces gradients.

    Args:
        state: the model, wrapped; `state.config.finalize_model_grads_func` is set.
        batches: this data rank's microbatches.
        on_output: as in `step.run_schedule`.
        schedule: for this many ranks, chunks and microbatches.
        exchange: carries the messages.
        record: whether to keep the time of each action.

    Returns:
        Third results of `on_output` on the last stage, and the events.
    """
    work = ChunkWork(state, batches, on_output)
    events = execute(schedule, state.groups.pipeline.rank(), work, exchange, record)
    state.config.finalize_model_grads_func(list(state.chunks), None)
    return work.results, events
