"""What the worker processes run for `benchmarks.real`: recorded training steps, and encoder activations that are alive.

Imports megatron: only workers import this module.
"""

import os
import weakref
from typing import Any

import torch
import torch.distributed as dist

from megavlm.config.schema import Recipe
from megavlm.models.encoder import VisionEncoder
from megavlm.pipeline.simulate import simulate
from megavlm.train.calibrate import Calibration, fit_position, in_seconds
from megavlm.train.scheduling import step_costs
from megavlm.train.state import build_state
from megavlm.train.step import Recording, train_step


def pin() -> int:
    """Give this rank a core and a thread of its own; returns the core."""
    cores = sorted(os.sched_getaffinity(0))
    core = cores[dist.get_rank() % len(cores)]
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    return core


def steps(recipe: Recipe, num_warm: int, num_pairs: int) -> dict[str, Any]:
    """Train; calibrate on every second step, and predict those between them: the machine's speed drifts.

    Returns:
        `measured_s` and `simulated_s`: makespans of the predicted steps; `bound_s`: their work over the ranks.
    """
    everything = os.sched_getaffinity(0)
    pin()
    try:
        return _steps(recipe, num_warm, num_pairs)
    finally:
        os.sched_setaffinity(0, everything)


def _steps(recipe: Recipe, num_warm: int, num_pairs: int) -> dict[str, Any]:
    state = build_state(recipe)
    recordings: list[Recording] = []
    for step in range(num_warm + 2 * num_pairs):
        kept = recordings if step >= num_warm else None
        train_step(state, step, kept)
    state.loader.close()
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, recordings)  # one rank a position: no tensor, context or data parallelism
    home = everyones[-1]
    flops = [step_costs(state.layout, recording.inputs, state.costs) for recording in home]
    fits = [
        fit_position(position, [(mine[step].events, flops[step]) for step in range(0, 2 * num_pairs, 2)])
        for position, mine in enumerate(everyones)
    ]
    calibration = Calibration(tuple(lines for lines, _ in fits), tuple(send_s for _, send_s in fits))
    found: dict[str, Any] = {"measured_s": [], "simulated_s": [], "bound_s": []}
    for step in range(1, 2 * num_pairs, 2):
        seconds = in_seconds(flops[step], calibration, home[step].schedule)
        found["simulated_s"].append(simulate(home[step].schedule, seconds).makespan_s)
        found["measured_s"].append(max(mine[step].events[-1].end_s for mine in everyones))
        found["bound_s"].append(seconds.work_s / len(everyones))
    return found


class _Held:
    """A tensor that autograd keeps; tells when it lets go."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class LiveBytes:
    """Bytes of distinct storages that the encoder's graphs hold, and the most there were at once."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._holders: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> _Held | torch.Tensor:
        """Called by autograd when it saves a tensor."""
        if isinstance(tensor, torch.nn.Parameter) or (
            tensor._is_view() and isinstance(tensor._base, torch.nn.Parameter)
        ):
            return tensor
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if not self._holders.get(key):
            self.now += size
            self.peak = max(self.peak, self.now)
        self._holders[key] = self._holders.get(key, 0) + 1
        held = _Held(tensor)
        weakref.finalize(held, self._let_go, key, size)
        return held

    def _let_go(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            self.now -= size

    @staticmethod
    def unpack(held: _Held | torch.Tensor) -> torch.Tensor:
        """Called by autograd when it needs the tensor."""
        return held.tensor if isinstance(held, _Held) else held


def encoder_peak_bytes(recipe: Recipe) -> int:
    """Most bytes that this rank's encoder activations had at once in a training step."""
    state = build_state(recipe)
    live = LiveBytes()
    forward = VisionEncoder.forward

    def counted(self: VisionEncoder, *inputs: torch.Tensor) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(live.pack, live.unpack):
            return forward(self, *inputs)

    VisionEncoder.forward = counted  # type: ignore[method-assign]
    try:
        train_step(state, 0)
    finally:
        VisionEncoder.forward = forward  # type: ignore[method-assign]
    state.loader.close()
    assert live.now == 0, "activations are still alive behind the step"
    return live.peak
