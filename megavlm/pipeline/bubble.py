"""The encoder in the language model's bubbles: every rank encodes its share of a microbatch while it would be idle.

The idea is Optimus' (arXiv:2408.03505), the bound on the encoder's activations BigMac's (arXiv:2605.25451). The order
of the language model's work stays that of 1F1B (or interleaved). A list scheduler plays it with given costs and
decides, whenever a rank is free: encode now what the first stage needs next; go on with the language model; or, until
that can go on, encode ahead or run a backward of the encoder that fits into the gap. How far ahead "needs next"
reaches, and how much too long "fits" may be, depends on the costs; several rules are tried and the shortest result is
taken.

What the bound leaves: before the first backward only so many microbatches can be encoded, and after the last forward
only of so many the encoder's backward can be left. Idle time beyond that no order of the encoder's work can fill; where
it is in the beginning, more microbatches in flight (`extra_in_flight`) move it to the end.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megavlm.errors import use_error
from megavlm.pipeline.actions import Compute, EncoderPlace, Kind, Message, Schedule, StageMap, assemble
from megavlm.pipeline.costs import StageCosts
from megavlm.pipeline.schedules import language_orders, language_stages


@dataclass(frozen=True)
class Rule:
    """How the list scheduler decides.

    Attributes:
        num_ahead: microbatches beyond the ones that the first stage has begun whose encoding goes before the language
            model's work. 0: only the next one, once it is all that the first stage waits for.
        overhang: part of an encoder action that may reach beyond the gap it is put into: 0 none, 1 any.
    """

    num_ahead: int
    overhang: float


RULES: tuple[Rule, ...] = tuple(
    Rule(num_ahead, overhang) for num_ahead in (0, 1, 2) for overhang in (0.0, 0.25, 0.5, 1.0)
)


QUICK_RULES: tuple[Rule, ...] = (Rule(0, 1.0), Rule(0, 0.5), Rule(1, 0.5))
"""For each step of a training run: nearly as short as with all `RULES` (0.01% longer on average, 0.1% at most, over the
models and batches of benchmarks/balance.py), in a quarter of the time."""


def bubble(
    num_ranks: int,
    num_microbatches: int,
    costs: StageCosts,
    *,
    max_live_encoder: int,
    num_chunks: int = 1,
    train_encoder: bool = True,
    recompute: bool = False,
    extra_in_flight: int = 0,
    rules: Sequence[Rule] = RULES,
) -> Schedule:
    """Place the encoder's work into the gaps of the language model's schedule.

    Args:
        num_ranks: p; every rank encodes its share.
        num_microbatches: m.
        costs: of all the work; decides where the gaps are.
        max_live_encoder: a rank holds encoder activations of at most so many microbatches. With one chunk and a bound
            below min(p, m) the language model keeps fewer microbatches in flight. It begins to wait below about p + 2.
            Where no activations are held (`train_encoder`, `recompute`) it is how many microbatches are encoded ahead
            of the first stage, that is how many features wait there, as far as `costs` foretell the times.
        num_chunks: language-model chunks a rank.
        train_encoder: False: no backward of the encoder, no activations.
        recompute: keep only the features and encode again right before each backward: a third more work of the encoder,
            activations of one microbatch.
        extra_in_flight: with one chunk, all ranks but the last run so many forwards further ahead than in 1F1B, and
            hold the language model's activations of so many microbatches more (as far as `max_live_encoder` allows).
            Idle time at the beginning, where nothing is left to encode, becomes idle time at the end, which the
            encoder's backward fills.
        rules: tried one after the other.

    Raises:
        UseError: the bound cannot be held, or see `schedules.interleaved`.
    """
    assert costs.shape == (num_ranks, num_chunks, num_microbatches), costs.shape
    assert train_encoder or not recompute, "a frozen encoder has nothing to compute again"
    encoder = EncoderPlace(tuple(range(num_ranks)), is_trained=train_encoder)
    stage_map = language_stages(num_ranks, num_chunks, num_microbatches, encoder)
    keeps = train_encoder and not recompute
    orders = _language_orders(stage_map, max_live_encoder, keeps, extra_in_flight)
    needs = [
        {compute: stage_map.needs(rank, compute) for compute in [*orders[rank], *stage_map.computes(rank)]}
        for rank in range(num_ranks)
    ]
    best: tuple[float, list[list[Compute]]] | None = None
    for rule in rules:
        result = _Placer(stage_map, orders, needs, costs, max_live_encoder, keeps, rule).place()
        if best is None or result[0] < best[0]:
            best = result
    assert best is not None, "no rules"
    bound = max_live_encoder if keeps else 1 if recompute else None
    return assemble("bubble", stage_map, best[1], bound)


def least_live_encoder(num_ranks: int, num_chunks: int, num_microbatches: int) -> int:
    """The smallest bound with which the language model's order need not change: its microbatches in flight."""
    in_flight = most = 0
    for compute in language_orders(num_ranks, num_chunks, num_microbatches)[0]:
        if compute.chunk == 0:
            in_flight += 1 if compute.kind == "F" else -1
            most = max(most, in_flight)
    return most


def _language_orders(
    stage_map: StageMap, max_live_encoder: int, keeps: bool, extra_in_flight: int
) -> list[list[Compute]]:
    """1F1B or interleaved; with kept activations no more in flight than the bound lets live.

    Raises:
        UseError: see `bubble`.
    """
    layout = stage_map.num_ranks, stage_map.num_chunks, stage_map.num_microbatches
    can_wait = stage_map.num_chunks == 1
    least = least_live_encoder(*layout) if keeps and not can_wait else 1
    if max_live_encoder < least:
        chunks = f" with {stage_map.num_chunks} model chunks" if stage_map.num_chunks > 1 else ""
        raise use_error(
            "max_live_encoder",
            max_live_encoder,
            f"at least {least} microbatches for {stage_map.num_ranks} pipeline ranks{chunks}",
            "raise the bound on live encoder activations, or use fewer model chunks",
        )
    assert extra_in_flight == 0 or can_wait, "interleaved pipelines have their own number in flight"
    bound = max_live_encoder if keeps and can_wait else None
    orders = language_orders(*layout, max_in_flight=bound)
    if extra_in_flight:
        # As the first of a longer pipeline; the last rank has nothing to wait for and goes on in turns.
        longer = language_orders(stage_map.num_ranks + extra_in_flight, *layout[1:], max_in_flight=bound)
        orders[:-1] = longer[: stage_map.num_ranks - 1]
    return orders


class _Placer:
    """Plays the language model's orders under one rule and writes down the work of every rank as it begins."""

    def __init__(
        self,
        stage_map: StageMap,
        language: list[list[Compute]],
        needs: list[dict[Compute, list[Message]]],
        costs: StageCosts,
        bound: int,
        keeps: bool,
        rule: Rule,
    ) -> None:
        self.stage_map = stage_map
        self.language = language
        self.needs = needs
        self.costs = costs
        self.bound = bound
        self.rule = rule
        assert stage_map.encoder is not None
        self.is_trained = stage_map.encoder.is_trained
        self.keeps = keeps
        self.forward_kind: Kind = "EF" if keeps else "E"
        ranks = range(stage_map.num_ranks)
        self.placed: list[list[Compute]] = [[] for _ in ranks]
        self.free_s = [0.0 for _ in ranks]
        self.num_language = [0 for _ in ranks]
        self.num_encoded = [0 for _ in ranks]
        self.num_encoded_back = [0 for _ in ranks]
        self.num_first = 0
        """Forwards that the first stage has begun."""
        self.here_s: dict[Message, float] = {}
        """When a message is at its destination; known once the work that gives it has begun."""
        self.elapsed_s = [self._sums(rank) for rank in ranks]
        self.index = [{compute: i for i, compute in enumerate(order)} for order in language]

    def place(self) -> tuple[float, list[list[Compute]]]:
        """(makespan, per rank the work in order)."""
        num_ranks = self.stage_map.num_ranks
        num_left = sum(len(self.stage_map.computes(rank)) for rank in range(num_ranks))
        moments = [0.0]
        while num_left:
            assert moments, "nothing left to wait for"
            now = heapq.heappop(moments)
            # The first stage goes first: what it begins makes other work urgent.
            for rank in range(num_ranks):
                compute = self._choose(rank, now) if self.free_s[rank] <= now else None
                if compute is not None:
                    num_left -= 1
                    for time_s in self._begin(rank, compute, now):
                        # Also when it is still now: work without duration (no images) changes what can begin.
                        heapq.heappush(moments, time_s)
        return max(self.free_s), self.placed

    def _choose(self, rank: int, now: float) -> Compute | None:
        forward, backward = self._encoder_work(rank, now)
        if self._is_urgent(rank):
            if forward is not None:
                return forward
            if backward is not None:
                return backward
        next_language = self._next_language(rank)
        if next_language is not None and self._is_ready(rank, next_language, now):
            return next_language
        gap_s = self._ready_s(rank, next_language, now) - now if next_language is not None else math.inf
        for compute in (forward, backward):
            if compute is not None and self._time_s(rank, compute) * (1 - self.rule.overhang) <= gap_s:
                return compute
        return None

    def _encoder_work(self, rank: int, now: float) -> tuple[Compute | None, Compute | None]:
        """The encoder's forward and backward that the rank could begin now."""
        forward = backward = None
        num_forward, num_backward = self.num_encoded[rank], self.num_encoded_back[rank]
        num_held = num_forward - (num_backward if self.keeps else self.num_first)
        if num_forward < self.stage_map.num_microbatches and num_held < self.bound:
            forward = Compute(self.forward_kind, num_forward)
        if self.is_trained and num_backward < num_forward:
            candidate = Compute("EB", num_backward)
            if self._is_ready(rank, candidate, now):
                backward = candidate
        return forward, backward

    def _is_urgent(self, rank: int) -> bool:
        """Whether the rank's next encoder forward comes before the language model."""
        microbatch = self.num_encoded[rank]
        if microbatch >= self.stage_map.num_microbatches:
            return False
        if microbatch < self.num_first + self.rule.num_ahead:
            return True
        waiting = self._next_language(self.stage_map.first_rank)
        return waiting is not None and waiting.kind == "F" and waiting.chunk == 0 and waiting.microbatch == microbatch

    def _next_language(self, rank: int) -> Compute | None:
        order, index = self.language[rank], self.num_language[rank]
        return order[index] if index < len(order) else None

    def _is_ready(self, rank: int, compute: Compute, now: float) -> bool:
        return all(self.here_s.get(need, math.inf) <= now for need in self.needs[rank][compute])

    def _time_s(self, rank: int, compute: Compute) -> float:
        """Duration; of an encoder backward with the forward that it repeats."""
        time_s = self.costs.time_s(rank, compute)
        if compute.kind == "EB" and not self.keeps:
            time_s += self.costs.time_s(rank, Compute("EF", compute.microbatch))
        return time_s

    def _ready_s(self, rank: int, compute: Compute, now: float) -> float:
        """When what it needs is there: exact if that has begun, else not before."""
        return max((self._arrival_s(need, now) for need in self.needs[rank][compute]), default=now)

    def _arrival_s(self, message: Message, now: float) -> float:
        """Earliest time at which a message can be there, if its source did nothing but the language model from now."""
        if message in self.here_s:
            return self.here_s[message]
        source = message.source
        if message.payload == "features":
            work = Compute(self.forward_kind, message.microbatch)
            return max(now, self.free_s[source]) + self.costs.time_s(source, work) + self._transit_s(message)
        kind: Kind = "F" if message.payload == "activation" else "B"
        position = self.stage_map.stages.index((message.destination, message.chunk))
        stage = self.stage_map.stages[position + (-1 if kind == "F" else 1)]
        work = Compute(kind, message.microbatch, stage[1])
        before_s = self.elapsed_s[source][self.index[source][work]] - self.elapsed_s[source][self.num_language[source]]
        start_s = max(max(now, self.free_s[source]) + before_s, self._ready_s(source, work, now))
        return start_s + self.costs.time_s(source, work) + self._transit_s(message)

    def _transit_s(self, message: Message) -> float:
        if message.is_local:
            return 0.0
        link = self.costs.link
        return self.costs.message_bytes(message) / link.bandwidth_bytes_per_s + link.latency_s

    def _begin(self, rank: int, compute: Compute, now: float) -> list[float]:
        """Put the work into the rank's list; returns the times at which something changes."""
        end_s = now + self._time_s(rank, compute)
        self.free_s[rank] = end_s
        if compute.kind == "EB" and not self.keeps:
            self.placed[rank].append(Compute("EF", compute.microbatch))
        self.placed[rank].append(compute)
        if compute.kind in ("E", "EF"):
            self.num_encoded[rank] += 1
        elif compute.kind == "EB":
            self.num_encoded_back[rank] += 1
        else:
            self.num_language[rank] += 1
            if compute.kind == "F" and (rank, compute.chunk) == self.stage_map.stages[0]:
                self.num_first += 1
        moments = [end_s]
        for message in self.stage_map.gives(rank, compute):
            self.here_s[message] = end_s + self._transit_s(message)
            moments.append(self.here_s[message])
        return moments

    def _sums(self, rank: int) -> list[float]:
        """Time of the rank's first 0, 1, 2, ... pieces of language-model work."""
        sums = [0.0]
        for compute in self.language[rank]:
            sums.append(sums[-1] + self.costs.time_s(rank, compute))
        return sums
