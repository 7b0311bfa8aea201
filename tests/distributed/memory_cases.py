"""What the pool runs for the planner's memory: one real training step, its tensors counted by part."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer

from megavlm.config.schema import Recipe
from megavlm.models.architecture import Architecture
from megavlm.parallel.topology import topology_of
from megavlm.peft.targets import linears_of
from megavlm.pipeline.actions import Compute, Schedule
from megavlm.pipeline.runtime import Needs
from megavlm.planner.experts import Routed
from megavlm.planner.memory import Load, RankMemory
from megavlm.train import step as step_module
from megavlm.train.pipeline_work import PartsWork
from megavlm.train.scheduling import training_schedule
from megavlm.train.state import TrainState, build_state


@dataclass(frozen=True)
class Counted:
    """Bytes of one rank in a real step, and what the planner needs to predict them.

    Attributes:
        weights: parameters and buffers.
        gradients: gradient buffers.
        optimizer: what the optimizer holds beside these.
        encoder: the most that autograd held for the encoder at a time.
        language: for the language model, without the logits.
        logits: for the loss.
        together: for all of these at one time.
        lengths: segments of the rows of this rank's microbatches.
        grids: per microbatch the images that this rank encodes.
        data_grids: per microbatch all images of its data rank's row.
        position: of the rank in the schedule.
        architecture: of the model.
        schedule: that was executed.
        routed: per microbatch the tokens at this rank's experts; without experts None.
    """

    weights: int
    gradients: int
    optimizer: int
    encoder: int
    language: int
    logits: int
    together: int
    lengths: tuple[tuple[int, ...], ...]
    grids: tuple[tuple[tuple[int, int, int], ...], ...]
    data_grids: tuple[tuple[tuple[int, int, int], ...], ...]
    position: int
    architecture: Architecture
    schedule: Schedule
    routed: tuple[Routed | None, ...]


class _Held:
    """A tensor in autograd's hands."""

    def __init__(self, tensor: torch.Tensor, part: str) -> None:
        self.tensor, self.part = tensor, part


class SavedBytes:
    """Counts the storages that autograd holds, each once, by the part of the model that saved them first."""

    def __init__(self, known: set[int]) -> None:
        self.part = "language"
        self.peaks = {"encoder": 0, "language": 0, "logits": 0, "together": 0}
        self._known = known
        self._held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(self, tensor: torch.Tensor) -> Any:
        """Called by autograd for everything that it saves."""
        if tensor.untyped_storage().data_ptr() in self._known:
            return tensor
        held = _Held(tensor, self.part)
        self._held.add(held)
        self.measure()
        return held

    @staticmethod
    def unpack(held: Any) -> torch.Tensor:
        """Called by autograd when it needs it."""
        return held.tensor if isinstance(held, _Held) else held

    def measure(self) -> None:
        """Compare with the peaks so far."""
        sizes: dict[int, tuple[int, str]] = {}
        for held in list(self._held):
            storage = held.tensor.untyped_storage()
            sizes.setdefault(storage.data_ptr(), (storage.nbytes(), held.part))
        now = dict.fromkeys(self.peaks, 0)
        for size, part in sizes.values():
            now[part] += size
            now["together"] += size
        self.peaks = {name: max(self.peaks[name], now[name]) for name in now}


class _Watch:
    """Tells a counter which part of the model is at work, and has it look after every piece."""

    def __init__(self, saved: SavedBytes) -> None:
        self._saved, self._run = saved, PartsWork.run

    def __enter__(self) -> None:
        saved, run = self._saved, self._run

        def watched(work: PartsWork, compute: Compute, needs: Needs) -> torch.Tensor | None:
            saved.part = "encoder" if compute.kind in ("E", "EF", "EB") else "language"
            result = run(work, compute, needs)
            saved.measure()
            return result

        PartsWork.run = watched  # type: ignore[method-assign]

    def __exit__(self, *_error: object) -> None:
        PartsWork.run = self._run  # type: ignore[method-assign]


class _Routing:
    """Counts the tokens that come to this rank's experts in the forward pass, by microbatch."""

    def __init__(self) -> None:
        self._seen: dict[int, list[tuple[int, int]]] = {}
        self._microbatch: int | None = None
        self._run, self._look, self._compute = PartsWork.run, MoELayer.routed_experts_compute, SequentialMLP.forward

    def __enter__(self) -> "_Routing":
        run, look, compute = self._run, self._look, self._compute
        looked_at = 0

        def ran(work: PartsWork, piece: Compute, needs: Needs) -> torch.Tensor | None:
            self._microbatch = piece.microbatch if piece.kind == "F" else None
            return run(work, piece, needs)

        def looked(layer: MoELayer, hidden: torch.Tensor, probs: torch.Tensor) -> Any:
            nonlocal looked_at
            looked_at = len(probs)
            return look(layer, hidden, probs)

        def computed(experts: SequentialMLP, tokens: torch.Tensor, *rest: torch.Tensor) -> Any:
            if self._microbatch is not None:
                self._seen.setdefault(self._microbatch, []).append((len(tokens), looked_at))
            return compute(experts, tokens, *rest)

        PartsWork.run = ran  # type: ignore[method-assign]
        MoELayer.routed_experts_compute, SequentialMLP.forward = looked, computed
        return self

    def __exit__(self, *_error: object) -> None:
        PartsWork.run = self._run  # type: ignore[method-assign]
        MoELayer.routed_experts_compute, SequentialMLP.forward = self._look, self._compute

    def of(self, microbatch: int, gathers: bool, held_tokens: float) -> Routed | None:
        """Means over the layers of a microbatch; None: no expert of this rank has run.

        Args:
            microbatch: its number.
            gathers: whether all ranks' tokens come, before the experts' are picked.
            held_tokens: the rank's own, whose choices it looks at otherwise.
        """
        if microbatch not in self._seen:
            return None
        arriving, looked_at = zip(*self._seen[microbatch], strict=True)
        number = len(arriving)
        return Routed(sum(arriving) / number, sum(looked_at) / number if gathers else held_tokens)


class _WatchedStage:
    """A stage whose loss is told apart from the rest of the language model."""

    def __init__(self, stage: Any, saved: SavedBytes) -> None:
        self._stage, self._saved = stage, saved
        self.look_ahead, self.metric_sizes, self.figures = stage.look_ahead, stage.metric_sizes, stage.figures
        self.census, self.memory, self.split_gradients = stage.census, stage.memory, stage.split_gradients
        self.count = stage.count

    def loss(self, *arguments: Any) -> Any:
        before, self._saved.part = self._saved.part, "logits"
        result = self._stage.loss(*arguments)
        self._saved.part = before
        return result


def count_step(recipe: Recipe) -> Counted:
    """Train one step and count."""
    state = build_state(recipe)
    storages = _weight_storages(state)
    saved = SavedBytes(set(storages))
    state.stage = _WatchedStage(state.stage, saved)
    inputs = state.inputs(0)
    rows = step_module.load_rows(state, 0)
    with _Routing() as routing, _Watch(saved), torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        step_module.train_step(state, 0)
    part = state.groups.topology.replica_of(state.parts.rank)
    data = state.groups.topology.loading_data_rank(state.parts.rank)
    state.loader.close()
    parallel = recipe.parallel
    gathers = parallel.moe_token_dispatcher_type == "allgather"
    shared_by = parallel.context_parallel_size * (
        parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    )
    lengths = tuple(tuple((b.cu_seqlens[1:] - b.cu_seqlens[:-1]).tolist()) for b in rows.batches)
    return Counted(
        weights=sum(storages.values()) + _packed_bytes(state),
        gradients=_gradient_bytes(state),
        optimizer=_optimizer_bytes(state, set(storages)),
        encoder=saved.peaks["encoder"],
        language=saved.peaks["language"],
        logits=saved.peaks["logits"],
        together=saved.peaks["together"],
        lengths=lengths,
        grids=tuple(
            tuple(one.grids[key] for key in one.images_of(part[0].number)) if part is not None else ()
            for one in inputs.shares.microbatches
        ),
        data_grids=tuple(tuple(one.grids[key] for key in one.images_in(data)) for one in inputs.shares.microbatches),
        position=state.groups.position,
        architecture=state.directory.architecture,
        schedule=training_schedule(state.layout, inputs, state.costs),
        routed=tuple(routing.of(number, gathers, sum(row) / shared_by) for number, row in enumerate(lengths)),
    )


def count_tuning(recipe: Recipe) -> dict[str, int]:
    """Bytes of a training step by part, matrices in 4 bits included; `all` is everything together."""
    state = build_state(recipe)
    storages = _weight_storages(state)
    saved = SavedBytes(set(storages))
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack), _Watch(saved):
        step_module.train_step(state, 0)
    state.loader.close()
    figures = {
        "weights": sum(storages.values()) + _packed_bytes(state),
        "gradients": _gradient_bytes(state),
        "optimizer": _optimizer_bytes(state, set(storages)),
        "activations": saved.peaks["together"],
    }
    return figures | {"all": sum(figures.values())}


def compare(recipe: Recipe) -> dict[str, tuple[float, float]]:
    """(counted, predicted) bytes of this rank by part; `all` is everything together at the worst time."""
    counted = count_step(recipe)
    topology = topology_of(recipe.parallel, dist.get_world_size())
    memory = RankMemory(counted.architecture, recipe, topology, counted.position)
    num_tokens_of = counted.architecture.inputs.num_image_tokens
    loads = [
        Load(lengths, grids, sum(num_tokens_of(grid) for grid in row), routed)
        for lengths, grids, row, routed in zip(
            counted.lengths, counted.grids, counted.data_grids, counted.routed, strict=True
        )
    ]
    predicted = memory.peak(counted.schedule, loads)
    return {
        "weights": (counted.weights, predicted.weights),
        "gradients": (counted.gradients, predicted.gradients),
        "optimizer": (counted.optimizer, predicted.optimizer),
        "activations": (counted.together, predicted.activations),
        "all": (
            counted.weights + counted.gradients + counted.optimizer + counted.together,
            predicted.state + predicted.activations,
        ),
    }


def _weight_storages(state: TrainState) -> dict[int, int]:
    """Bytes of parameters and buffers by storage."""
    tensors = [tensor for part in state.parts.all for tensor in (*part.parameters(), *part.buffers())]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def _packed_bytes(state: TrainState) -> int:
    """Of matrices in 4 bits, which are no parameters."""
    linears = [linear for part in state.parts.all for _, linear in linears_of(part)]
    return sum(linear.store.num_bytes for linear in linears if linear.store is not None)


def _gradient_bytes(state: TrainState) -> int:
    buffers = [buffer for chunk in state.parts.wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers)


def _optimizer_bytes(state: TrainState, weights: set[int]) -> int:
    """Averages, and main parameters that are no views of the weights."""
    sizes: dict[int, int] = {}
    for inner in state.optimizer.chained_optimizers:
        if inner.optimizer is None:
            continue
        tensors = [p for group in inner.optimizer.param_groups for p in group["params"]]
        tensors += [t for slots in inner.optimizer.state.values() for t in slots.values() if torch.is_tensor(t)]
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
