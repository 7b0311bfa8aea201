"""The order of a run's samples, from its recipe: sources, phases, groups, packs."""

import logging
from collections.abc import Sequence

import numpy as np

from megavlm.config.mixture import phase_starts
from megavlm.config.schema import Recipe
from megavlm.data.balance import SampleCosts
from megavlm.data.dataset import Dataset
from megavlm.data.groups import Groups, groups_of
from megavlm.data.mixture import Mixture, Phase, Shares, Source
from megavlm.data.plan import GlobalBatchPlan

logger = logging.getLogger(__name__)


def build_plan(
    recipe: Recipe,
    train_set: Dataset,
    source_sizes: Sequence[int],
    *,
    dp_size: int,
    costs: SampleCosts | None,
    microbatches_multiple: int,
) -> GlobalBatchPlan:
    """The plan of a run.

    Args:
        recipe: of the run.
        train_set: prepared rows.
        source_sizes: how many of them each source of `data.mixture` has; one number without a mixture.
        dp_size: data parallel ranks.
        costs: see `GlobalBatchPlan`.
        microbatches_multiple: see `GlobalBatchPlan`.

    Raises:
        UseError: sizes that do not divide, a source without rows or with too small a share, groups of several sizes.
    """
    groups = build_groups(recipe, train_set, source_sizes)
    return GlobalBatchPlan(
        num_samples=len(train_set),
        seed=recipe.train.seed,
        global_batch_size=recipe.train.global_batch_size,
        micro_batch_size=recipe.train.micro_batch_size,
        dp_size=dp_size,
        shuffle=recipe.data.shuffle,
        costs=costs,
        microbatches_multiple=microbatches_multiple,
        mixture=build_mixture(recipe, train_set, source_sizes, groups),
        groups=groups,
    )


def build_groups(recipe: Recipe, train_set: Dataset, source_sizes: Sequence[int]) -> Groups | None:
    """Rows that stay together by `data.group_by`; rows of different sources never do. None: each is on its own.

    Raises:
        UseError: they are of several sizes, and the recipe does not say that such are left out.
    """
    if not recipe.data.group_by:
        return None
    source_N = np.repeat(np.arange(len(source_sizes), dtype=np.uint64), source_sizes)
    _, ids_N = np.unique(np.stack((source_N, train_set.index.groups_N)), axis=1, return_inverse=True)
    groups = groups_of(ids_N, leave_out=recipe.data.on_error == "skip")
    left_out = np.flatnonzero(groups.group_of_N < 0)
    if len(left_out):
        logger.info(
            "left out %d rows: their groups (data.group_by) are not of %d rows as most are (first: %s)",
            len(left_out),
            groups.size,
            train_set.sample_id(int(left_out[0])),
        )
    return groups


def build_mixture(
    recipe: Recipe, train_set: Dataset, source_sizes: Sequence[int], groups: Groups | None = None
) -> Mixture | None:
    """What `data.mixture` and `data.curriculum` say; None where they say nothing.

    With groups it draws those, each as long as its longest row.

    Raises:
        UseError: a source without rows or with too small a share, a phase in which a source has no row.
    """
    data, train = recipe.data, recipe.train
    if not data.mixture and not data.curriculum:
        return None
    lengths_N, rows_a_unit = train_set.num_tokens_each, 1
    if groups is not None:
        first_rows = np.cumsum((0, *source_sizes))
        source_sizes = np.diff(np.searchsorted(groups.members_GK[:, 0], first_rows)).tolist()
        lengths_N, rows_a_unit = groups.reduced(lengths_N, np.maximum), groups.size
    sources = [Source("train", size) for size in source_sizes]
    if data.mixture:
        sources = [
            Source(source.name, size, source.weight, source.epochs, source.task)
            for source, size in zip(data.mixture, source_sizes, strict=True)
        ]
    phases = [
        Phase(start, phase.weights, phase.max_length, phase.order == "length")
        for start, phase in zip(phase_starts(data, train.train_iters), data.curriculum, strict=True)
    ]
    return Mixture(
        sources,
        phases or [Phase()],
        Shares(data.mixture_temperature, tuple((task.name, task.weight) for task in data.mixture_tasks)),
        lengths_N=lengths_N,
        batch_size=train.global_batch_size // rows_a_unit,
        seed=train.seed,
        shuffle=data.shuffle,
    )


def num_steps(recipe: Recipe, plan: GlobalBatchPlan) -> int:
    """Optimizer steps of the run."""
    if recipe.train.train_iters:
        return recipe.train.train_iters
    if plan.mixture is None:
        return plan.num_steps(recipe.train.num_train_epochs)
    by_epochs = any(source.epochs for source in recipe.data.mixture)
    return plan.num_mixture_steps(recipe.train.num_train_epochs, "epochs" if by_epochs else recipe.data.mixture_stop)
