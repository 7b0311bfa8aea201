"""Which samples go into which step, microbatch and data rank: pure functions that every rank computes alike.

The set and the order of a global batch's samples depend on the data, the seed and the step only, never on the layout:
that is what makes a run resume exactly after the layout changed. How it is cut into microbatches does depend on it:
either into equal numbers of samples, in their order, or, where the costs of the samples are given, into packs of equal
work. Rows of a group are never cut apart.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

from megavlm.data.balance import SampleCosts, Split, cost_of_groups, split
from megavlm.data.groups import Groups
from megavlm.data.mixture import Mixture, Stop
from megavlm.errors import use_error


@dataclass(frozen=True)
class GlobalBatchPlan:
    """The plan of a run.

    Attributes:
        num_samples: rows that are left after too long ones were dropped.
        seed: of the shuffling.
        global_batch_size: samples an optimizer step.
        micro_batch_size: samples packed into one row; not used where `costs` are given.
        dp_size: data parallel ranks.
        shuffle: whether each epoch has an order of its own; False keeps the file order.
        costs: of all `num_samples` rows, alike on every rank (a measured unit has to be agreed on first). Then each
            step is split by cost: the number of microbatches is the least into which the samples fit, and may differ
            from step to step.
        microbatches_multiple: what the number of microbatches of a step split by cost is a multiple of: the pipeline
            size, for interleaved pipelines.
        mixture: of the rows (with `groups`, of the groups), which then gives the order; None: all rows are drawn alike.
        groups: rows that stay together: in a step, a microbatch, a pack; rows of none of them are not drawn. None: each
            is on its own.
    """

    num_samples: int
    seed: int
    global_batch_size: int
    micro_batch_size: int
    dp_size: int
    shuffle: bool = True
    costs: SampleCosts | None = None
    microbatches_multiple: int = 1
    mixture: Mixture | None = None
    groups: Groups | None = None

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            UseError: no samples, a negative seed, a global batch that does not divide, or, split by cost, one with
                fewer samples than every step has packs at least.
        """
        if self.seed < 0:
            raise use_error("train.seed", self.seed, "a number of at least 0", "change it")
        if self.num_samples < 1:
            raise use_error("data.train", "no rows that fit", "at least one", "raise data.max_length or add rows")
        if self.costs is not None:
            assert len(self.costs.num_tokens_N) == self.num_samples
            self._check_groups()
            self._check_packs()
            return
        samples_a_round = self.micro_batch_size * self.dp_size
        if self.global_batch_size < 1 or self.global_batch_size % samples_a_round != 0:
            raise use_error(
                "train.global_batch_size",
                self.global_batch_size,
                f"a multiple of micro_batch_size * data parallel size = {self.micro_batch_size} * {self.dp_size}",
                "change one of them",
            )
        self._check_groups()

    def _check_groups(self) -> None:
        """Whole groups only, wherever samples are counted."""
        if self.mixture is not None:
            assert self.mixture.num_samples == self._num_units
            assert self.mixture.batch_size * self._rows_a_unit == self.global_batch_size
        if self.groups is None:
            return
        assert len(self.groups.group_of_N) == self.num_samples
        if self.costs is not None:
            cost_of_groups(self.costs, self.groups.group_of_N)
        sizes = {"train.global_batch_size": self.global_batch_size}
        if self.costs is None:
            sizes["train.micro_batch_size"] = self.micro_batch_size
        for key, size in sizes.items():
            if size % self._rows_a_unit:
                raise use_error(key, size, f"a multiple of the {self._rows_a_unit} rows of a group", "change it")

    def _check_packs(self) -> None:
        unit = "sample" if self.groups is None else f"group of {self._rows_a_unit}"
        least = self.dp_size * self.microbatches_multiple * self._rows_a_unit
        if self.global_batch_size < least:
            of = f" x a multiple of {self.microbatches_multiple} microbatches" if self.microbatches_multiple > 1 else ""
            raise use_error(
                "train.global_batch_size",
                self.global_batch_size,
                f"at least {least}, one {unit} for every pack ({self.dp_size} data parallel ranks{of})",
                "raise it, or start fewer processes",
            )

    @property
    def num_microbatches(self) -> int:
        """Microbatches of one data rank in one step, where all steps have as many: where no costs are given."""
        assert self.costs is None, "steps that are split by cost differ: ask num_microbatches_of(step)"
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)

    def num_microbatches_of(self, step: int) -> int:
        """Microbatches of each data rank in a step; the same on every rank."""
        return self.num_microbatches if self.costs is None else len(_split_by_cost(self, step)[0])

    def num_steps(self, num_epochs: float) -> int:
        """Steps that see every sample `num_epochs` times; the last one reaches into the next epoch if it must."""
        return max(1, math.ceil(num_epochs * self._num_units * self._rows_a_unit / self.global_batch_size))

    def num_mixture_steps(self, num_epochs: float, stop: Stop) -> int:
        """Steps of so many runs through the mixture's sources: no further than they reach for `first_exhausted`."""
        assert self.mixture is not None
        steps = num_epochs * self.mixture.num_draws(stop) / self.mixture.batch_size
        return max(1, math.floor(steps) if stop == "first_exhausted" else math.ceil(steps))

    def num_consumed(self, step: int) -> int:
        """Samples that were consumed before `step`: the data cursor of a checkpoint."""
        return step * self.global_batch_size

    def global_batch_indices(self, step: int) -> np.ndarray:
        """Indices of the samples of `step` (from 0), in order, over the epochs' borders: int64 [global_batch_size]."""
        units = self._stream(step) if self.mixture is None else self.mixture.indices(step)
        return units if self.groups is None else self.groups.members_GK[units].ravel()

    def _stream(self, step: int) -> np.ndarray:
        """The samples (or groups) of a step, epoch after epoch."""
        size = self.global_batch_size // self._rows_a_unit
        units = np.empty(size, dtype=np.int64)
        filled = 0
        while filled < size:
            epoch, offset = divmod(step * size + filled, self._num_units)
            taken = self._epoch_order(epoch)[offset : offset + size - filled]
            units[filled : filled + len(taken)] = taken
            filled += len(taken)
        return units

    @property
    def _rows_a_unit(self) -> int:
        return 1 if self.groups is None else self.groups.size

    @property
    def _num_units(self) -> int:
        return self.num_samples if self.groups is None else len(self.groups.members_GK)

    def microbatches(self, step: int, dp_rank: int) -> list[tuple[int, ...]]:
        """The sample indices of each microbatch of one data rank.

        Without costs the global batch is cut contiguously into microbatches; microbatch m of data rank d is number
        m * dp_size + d, so that gradients are summed in the same order in every layout.

        With costs see `balance.split`. A microbatch is empty only where the samples of a step are so long that there
        have to be more packs than samples; whoever runs it needs a filler without weight.
        """
        assert 0 <= dp_rank < self.dp_size, (dp_rank, self.dp_size)
        if self.costs is not None:
            return list(_split_by_cost(self, step)[dp_rank])
        rows = self.global_batch_indices(step).reshape(-1, self.micro_batch_size)
        return [tuple(int(index) for index in row) for row in rows[dp_rank :: self.dp_size]]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self._num_units, dtype=np.int64)
        return _permutation(self._num_units, self.seed, epoch)


@functools.lru_cache(maxsize=4)
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    # Sorting raw PCG64 draws: numpy promises the raw stream for ever, but not what Generator.permutation makes of it.
    keys = np.random.PCG64([seed, epoch]).random_raw(num_samples)
    order = np.argsort(keys, kind="stable")
    order.flags.writeable = False
    return order


@functools.lru_cache(maxsize=8)
def _split_by_cost(plan: GlobalBatchPlan, step: int) -> Split:
    """[data rank][microbatch]: indices of the samples. Kept for the last few steps: costs milliseconds to make."""
    assert plan.costs is not None
    indices = plan.global_batch_indices(step)
    groups_N = None
    if plan.groups is not None:  # by place: over an epoch's border a group may be there twice
        groups_N = np.arange(len(indices)) // plan.groups.size
    parts = split(plan.costs.take(indices), plan.dp_size, multiple=plan.microbatches_multiple, groups_N=groups_N)
    return tuple(tuple(tuple(int(indices[number]) for number in pack) for pack in rank) for rank in parts)
