"""Samples of several sources by weights that may change in the course of training.

A pure function of the step: nothing is walked through to find the samples of a step, and nothing has to be kept but its
number. `interleave.py` says which source takes a draw; within a source every sample is seen once a pass, each pass in
an order of its own.

Shape suffixes: S sources, N samples, D draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megavlm.data.interleave import LEAST_SHARE, Interleave, NestedInterleave, Turns, draws_until, whole_weights
from megavlm.errors import use_error

Stop = Literal["first_exhausted", "all_exhausted", "epochs", "never"]
"""When a run through the sources ends; the first two as in Hugging Face datasets' `interleave_datasets`."""


@dataclass(frozen=True)
class Source:
    """Samples that belong together, and stand side by side among all samples.

    Attributes:
        name: for messages and logs.
        num_samples: at least 1.
        weight: at least 0; with `epochs` not used.
        epochs: how often each sample is seen; 0: by weight.
        task: of the source; tasks share first, then the sources of each.
    """

    name: str
    num_samples: int
    weight: float = 1.0
    epochs: float = 0.0
    task: str = ""


@dataclass(frozen=True)
class Phase:
    """From a step on.

    Attributes:
        first_step: from 0.
        weights: one for each source, in place of its own; empty: its own.
        max_length: samples with more tokens are not drawn; 0: all are.
        by_length: whether the passes go from short to long samples.
    """

    first_step: int = 0
    weights: tuple[float, ...] = ()
    max_length: int = 0
    by_length: bool = False


@dataclass(frozen=True)
class Shares:
    """How weights become shares.

    Attributes:
        temperature: T above 0: a share is proportional to weight * num_samples ** (1 / T), so that large sources are
            seen less often than their size would have it (multilingual BERT; mT5, arXiv 2010.11934, where 1 / T is
            called alpha); 0: to the weight alone.
        tasks: (name, weight) of every task that a source names; empty: tasks do not count.
    """

    temperature: float = 0.0
    tasks: tuple[tuple[str, float], ...] = ()

    def of_sources(self, sources: Sequence[Source], weights: Sequence[float]) -> list[float]:
        """A weight for each source; 0 stays 0."""
        if any(source.epochs for source in sources):
            # 0.1 * 3 is no decimal as floats are multiplied; its digits are.
            return [float(f"{source.epochs * source.num_samples:.12g}") for source in sources]
        if not self.temperature:
            return list(weights)
        power = 1 / self.temperature
        return [float(weight * source.num_samples**power) for source, weight in zip(sources, weights, strict=True)]


@dataclass(frozen=True)
class _Running:
    """A phase that was prepared.

    Attributes:
        phase: what was asked for.
        turns: who takes a draw, out of the active sources.
        active_S: their numbers.
        walks_S: each one's walk.
        before_S: how far each one's walk had come when the phase began.
    """

    phase: Phase
    turns: Turns
    active_S: np.ndarray
    walks_S: list["_Walk"]
    before_S: np.ndarray


class _Walk:
    """Passes through the samples of a source that are no longer than allowed."""

    def __init__(self, first: int, lengths_N: np.ndarray, phase: Phase, stream: int, seed: int, shuffle: bool) -> None:
        self._first, self._lengths_N, self._stream, self._seed, self._shuffle = first, lengths_N, stream, seed, shuffle
        self._by_length, self._max_length = phase.by_length, phase.max_length
        is_allowed_N = np.ones(len(lengths_N), dtype=bool)
        if phase.max_length:
            is_allowed_N = lengths_N <= phase.max_length
        self.num_samples = int(is_allowed_N.sum())
        self._is_allowed_N = is_allowed_N
        self._kept: dict[int, np.ndarray] = {}

    def samples(self, ordinals_D: np.ndarray) -> np.ndarray:
        """int64 [D]: the sample that is drawn when so many were drawn before."""
        passes_D, places_D = np.divmod(ordinals_D, self.num_samples)
        samples_D = np.empty(len(ordinals_D), dtype=np.int64)
        for number in np.unique(passes_D).tolist():
            is_here_D = passes_D == number
            samples_D[is_here_D] = self._order(number)[places_D[is_here_D]]
        return self._first + samples_D

    def _order(self, number: int) -> np.ndarray:
        """The samples of a pass; the last two passes are kept, because a global batch may reach over their border."""
        if number not in self._kept:
            while len(self._kept) >= 2:
                self._kept.pop(next(iter(self._kept)))
            order = np.arange(len(self._lengths_N))
            if self._shuffle:  # as in plan.py, with a stream for each source
                keys = np.random.PCG64([self._seed, number, self._stream]).random_raw(len(order))
                order = np.argsort(keys, kind="stable")
            order = order[self._is_allowed_N[order]]
            if self._by_length:
                order = order[np.argsort(self._lengths_N[order], kind="stable")]
            self._kept[number] = order
        return self._kept[number]


class Mixture:
    """Which sample is drawn when."""

    def __init__(
        self,
        sources: Sequence[Source],
        phases: Sequence[Phase],
        shares: Shares,
        *,
        lengths_N: np.ndarray,
        batch_size: int,
        seed: int,
        shuffle: bool,
    ) -> None:
        """Work out where each phase begins.

        Args:
            sources: in the order of their samples; as many samples in all as there are lengths.
            phases: by first step, which is 0 for the first.
            shares: how weights become shares.
            lengths_N: int64, tokens of the samples.
            batch_size: samples of a step.
            seed: of the shuffling.
            shuffle: whether each pass has an order of its own; False keeps the order of the samples.

        Raises:
            UseError: a source without samples, a share too small, a phase in which a source has no sample left.
        """
        assert phases and phases[0].first_step == 0
        assert all(first.first_step < then.first_step for first, then in zip(phases, phases[1:], strict=False))
        assert sum(source.num_samples for source in sources) == len(lengths_N)
        for source in sources:
            if source.num_samples < 1:
                raise use_error(f"data.mixture {source.name}", "no rows that fit", "at least one", "raise max_length")
        self.sources, self.phases, self.shares = tuple(sources), tuple(phases), shares
        self.batch_size = batch_size
        self._starts_S = np.cumsum([0, *(source.num_samples for source in sources)])
        self._lengths_N = lengths_N
        self._order = (seed, shuffle)
        self._walks: dict[tuple[int, int, bool], _Walk] = {}
        self._running: list[_Running] = []
        # How far each walk, and each source over all its walks, has come at the beginning of each phase.
        drawn: dict[_Walk, int] = {}
        totals_S = np.zeros(len(sources), dtype=np.int64)
        self._totals = [totals_S]
        for phase, then in zip(phases, [*phases[1:], None], strict=True):
            running = self._start(phase, drawn)
            self._running.append(running)
            if then is not None:
                counts = running.turns.counts((then.first_step - phase.first_step) * batch_size)
                for walk, count in zip(running.walks_S, counts.tolist(), strict=True):
                    drawn[walk] = drawn.get(walk, 0) + count
                totals_S = totals_S.copy()
                totals_S[running.active_S] += counts
                self._totals.append(totals_S)

    @property
    def num_samples(self) -> int:
        """Of all sources."""
        return len(self._lengths_N)

    @property
    def description(self) -> str:
        """All that the order depends on, but for seed and samples; equal for equal mixtures."""
        return repr((self.sources, self.phases, self.shares))

    def indices(self, step: int) -> np.ndarray:
        """Samples of a step (from 0), in order: int64 [batch_size]."""
        running, _ = self._at(step)
        first = (step - running.phase.first_step) * self.batch_size
        sources_D, ordinals_D = running.turns.draws(first, first + self.batch_size)
        samples_D = np.empty(self.batch_size, dtype=np.int64)
        for number, walk in enumerate(running.walks_S):
            is_mine_D = sources_D == number
            if is_mine_D.any():
                samples_D[is_mine_D] = walk.samples(running.before_S[number] + ordinals_D[is_mine_D])
        return samples_D

    def consumed(self, step: int) -> dict[str, int]:
        """Samples that were drawn from each source before a step."""
        running, number = self._at(step)
        totals_S = self._totals[number].copy()
        counts = running.turns.counts((step - running.phase.first_step) * self.batch_size)
        totals_S[running.active_S] += counts
        return {source.name: int(total) for source, total in zip(self.sources, totals_S, strict=True)}

    def num_draws(self, stop: Stop) -> int:
        """Draws until a run through the sources ends; of a mixture that does not change.

        `first_exhausted`: until all samples of a source have been seen; `all_exhausted`: of all sources;
        `epochs`: as often as each source is to be seen.
        """
        assert len(self._running) == 1 and stop != "never"
        if stop == "epochs":
            return round(sum(source.epochs * source.num_samples for source in self.sources))
        (running,) = self._running
        ends = [draws_until(running.turns, number, walk.num_samples) for number, walk in enumerate(running.walks_S)]
        return min(ends) if stop == "first_exhausted" else max(ends)

    def _at(self, step: int) -> tuple[_Running, int]:
        number = int(np.searchsorted([phase.first_step for phase in self.phases], step, side="right")) - 1
        return self._running[number], number

    def _start(self, phase: Phase, drawn: dict[_Walk, int]) -> _Running:
        weights = self.shares.of_sources(self.sources, phase.weights or [source.weight for source in self.sources])
        active = [number for number, weight in enumerate(weights) if weight > 0]
        assert active, "config checks that a weight is above 0"
        walks = [self._walk(number, phase) for number in active]
        return _Running(
            phase,
            self._turns(active, weights),
            np.array(active),
            walks,
            np.array([drawn.get(walk, 0) for walk in walks]),
        )

    def _walk(self, number: int, phase: Phase) -> _Walk:
        """Phases that draw from the same samples in the same way go on with one walk."""
        key = (number, phase.max_length, phase.by_length)
        if key not in self._walks:
            first, last = self._starts_S[number : number + 2].tolist()
            walk = _Walk(first, self._lengths_N[first:last], phase, number, *self._order)
            if not walk.num_samples:
                raise use_error(
                    "data.curriculum",
                    f"no sample of {self.sources[number].name} with at most {phase.max_length} tokens",
                    "at least one",
                    "raise max_length, or set the source's weight to 0 there",
                )
            self._walks[key] = walk
        return self._walks[key]

    def _turns(self, active: list[int], weights: Sequence[float]) -> Turns:
        """Who takes a draw, by the place of the source in `active`."""
        whole = self._whole([self.sources[number].name for number in active], [weights[number] for number in active])
        if not self.shares.tasks:
            return Interleave(whole)
        places = {
            name: [place for place, number in enumerate(active) if self.sources[number].task == name]
            for name, _ in self.shares.tasks
        }
        tasks = [(name, weight) for name, weight in self.shares.tasks if places[name]]
        names, task_weights = zip(*tasks, strict=True)
        return NestedInterleave(self._whole(names, task_weights), [places[name] for name in names], whole)

    def _whole(self, names: Sequence[str], weights: Sequence[float]) -> tuple[int, ...]:
        total = sum(weights)
        for name, weight in zip(names, weights, strict=True):
            if weight < LEAST_SHARE * total:
                raise use_error(
                    f"data.mixture {name}",
                    f"a share of {weight / total:.1e} of the draws",
                    f"at least {LEAST_SHARE:.1e}, or none",
                    "raise its weight, or raise data.mixture_temperature",
                )
        return whole_weights(weights)
