"""Gradients of parts of a loss by the last layer that all parts share, apart from each other and over all ranks.

That layer is the weight of the norm in front of the output layer. Behind it no token meets another, so the gradient
that arrives there is of each token's own loss, and that of a part is the sum over its tokens: over microbatches, data
and context ranks, and under sequence parallelism over tensor ranks. It is computed also where the weight is frozen.

Shape suffixes: T tokens of the whole row, S tokens that this rank's norm sees, H hidden size, K parts.
"""

import torch
import torch.distributed as dist

from megavlm.data.sample import Batch
from megavlm.losses.reduce import global_sums
from megavlm.parallel.context import local_part
from megavlm.train.stages.stage import SplitGradients
from megavlm.train.state import TrainState


class SharedGradients:
    """Of one step."""

    def __init__(self, state: TrainState, split: SplitGradients) -> None:
        """Watch the last norm, where this rank has it."""
        self._state, self._split = state, split
        hidden_size = state.directory.architecture.language.hidden_size
        self._sums_KH = torch.zeros(split.num_parts, hidden_size, dtype=torch.float64, device=state.device)
        self._latest: tuple[torch.Tensor, torch.Tensor] | None = None
        norms = [model.language.decoder.final_layernorm for model in state.parts.models if model.post_process]
        self._handles = [norm.register_forward_hook(self._keep) for norm in norms]

    def _keep(self, _norm: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self._latest = inputs[0].detach(), output

    def watch(self, batch: Batch) -> None:
        """Take in the gradient of the row that has just gone forward, when it comes."""
        assert self._latest is not None, "the last stage has a norm"
        (hidden, output), self._latest = self._latest, None
        if not output.requires_grad:  # nothing in front of it learns
            return
        groups, config = self._state.groups, self._state.parts.config
        context, tensor = groups.context, groups.tensor
        parts_S = local_part(self._split.parts_of(batch), batch.cu_seqlens, context.size(), context.rank())
        if config.sequence_parallel:
            parts_S = parts_S.chunk(tensor.size())[tensor.rank()]
        parts_S, epsilon = parts_S.to(hidden.device), config.layernorm_epsilon

        def add(grad: torch.Tensor) -> None:
            rows_SH = hidden.flatten(0, -2).float()
            normed_SH = rows_SH * torch.rsqrt(rows_SH.square().mean(1, keepdim=True) + epsilon)
            products_SH = grad.flatten(0, -2).float() * normed_SH
            self._sums_KH += torch.zeros_like(self._sums_KH, dtype=torch.float32).index_add(0, parts_S, products_SH)

        output.register_hook(add)

    def finish(self, divisor: float) -> torch.Tensor:
        """Norm of each part's gradient, divided: float64 [K], on every rank, which all call this, behind the step."""
        for handle in self._handles:
            handle.remove()
        groups = self._state.groups
        if self._state.parts.config.sequence_parallel and groups.is_last_stage:
            dist.all_reduce(self._sums_KH, group=groups.tensor)
        total_KH = global_sums(self._sums_KH.flatten(), groups.speaks).view_as(self._sums_KH)
        return total_KH.norm(dim=1) / divisor


def shared_gradients(state: TrainState) -> SharedGradients | None:
    """What a step keeps of gradients for the stage; None where it asks for nothing."""
    split = state.stage.split_gradients
    return None if split is None else SharedGradients(state, split)
