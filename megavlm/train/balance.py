"""The experts' load-balancing loss in a training step: its scale beside the main loss, and its figure.

Routers attach sums over tokens. Gradients of everything are divided by the stage's count over the global batch (weights
of predicted tokens, or pairs, or answers), so that these sums are scaled by that count over the number of tokens: what
is left is a mean.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megavlm.data.sample import Batch
from megavlm.losses.reduce import global_sums
from megavlm.models.experts import set_balance_scale, take_balance
from megavlm.train.state import TrainState


def prepare(state: TrainState, batches: Sequence[Batch]) -> float | None:
    """Set the scale for a step, before its first forward pass; returns the count that it was made of, where known.

    Args:
        state: the run.
        batches: this data rank's packed rows.
    """
    if state.groups.place is None:  # only encodes
        return None
    count = sum(state.stage.count(batch) for batch in batches)
    sums = torch.tensor([count, _num_tokens(batches)], dtype=torch.float64, device=state.device)
    dist.all_reduce(sums, group=state.groups.data)
    scale = torch.tensor(float(sums[0] / sums[1]), device=state.device)
    set_balance_scale(state.optimizer.scale_loss(scale))
    return float(sums[0])


def measure(state: TrainState, batches: Sequence[Batch]) -> float:
    """Mean over the global batch's tokens and the model's layers; the same on every rank, which all call this."""
    place = state.groups.place
    counts = place is not None and (place.stage, place.tensor, place.context) == (0, 0, 0)
    num_tokens = _num_tokens(batches) if counts else 0.0
    local = torch.stack(
        (
            take_balance(state.parts.models, state.device),
            torch.tensor(num_tokens, dtype=torch.float64, device=state.device),
        )
    )
    balance, tokens = global_sums(local, True).tolist()
    return balance / tokens / state.directory.architecture.language.num_layers


def _num_tokens(batches: Sequence[Batch]) -> float:
    return float(sum(int(batch.real_T.sum()) for batch in batches))
