"""Samples of several sources: shares, passes, phases; and that a step needs no other step."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.data.balance import SampleCosts
from megavlm.data.mixture import Mixture, Phase, Shares, Source
from megavlm.data.plan import GlobalBatchPlan
from megavlm.errors import UseError


def lengths_of(sources):
    total = sum(source.num_samples for source in sources)
    return np.random.default_rng(total).integers(5, 50, total)


ONE_PHASE = (Phase(),)


def mixture(sources, phases=ONE_PHASE, shares=None, batch_size=8, seed=3, shuffle=True):
    shares = shares or Shares()
    return Mixture(
        sources, phases, shares, lengths_N=lengths_of(sources), batch_size=batch_size, seed=seed, shuffle=shuffle
    )


def walk(mixed, num_steps):
    return np.concatenate([mixed.indices(step) for step in range(num_steps)])


def source_of(sources, samples_D):
    borders = np.cumsum([source.num_samples for source in sources])
    return np.searchsorted(borders, samples_D, side="right")


some_sources = st.lists(
    st.tuples(st.integers(1, 40), st.sampled_from([0.1, 0.25, 1.0, 2.0, 3.7])), min_size=1, max_size=5
).map(lambda pairs: [Source(f"s{number}", *pair) for number, pair in enumerate(pairs)])


@given(some_sources, st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_every_beginning_keeps_the_shares_and_every_pass_is_whole(sources, batch_size):
    samples_D = walk(mixture(sources, batch_size=batch_size), 200 // batch_size + 1)
    total = sum(source.weight for source in sources)
    borders = np.cumsum([0, *(source.num_samples for source in sources)])
    of_D = source_of(sources, samples_D)
    for number, source in enumerate(sources):
        count_D = np.cumsum(of_D == number)
        assert np.abs(count_D - np.arange(1, len(of_D) + 1) * source.weight / total).max() < 1 + 1e-9
        mine = samples_D[of_D == number]
        for start in range(0, len(mine) - source.num_samples + 1, source.num_samples):
            whole_pass = sorted(mine[start : start + source.num_samples])
            assert whole_pass == list(range(borders[number], borders[number + 1]))


PHASES = (
    Phase(0, (1.0, 0.0, 0.0), max_length=30, by_length=True),
    Phase(7, (1.0, 2.0, 0.0)),
    Phase(12, (0.0, 1.0, 1.0), max_length=30),
    Phase(20, (1.0, 1.0, 3.0)),
)
THREE = (Source("a", 60), Source("b", 25), Source("c", 90))


@given(st.integers(0, 40), st.sampled_from([(Phase(),), PHASES]), st.sampled_from([0.0, 2.0]))
@settings(max_examples=40, deadline=None)
def test_resuming_at_any_step_equals_the_walk_from_the_start(step, phases, temperature):
    walked = mixture(THREE, phases, Shares(temperature))
    before = [walked.indices(number) for number in range(step + 1)]
    resumed = mixture(THREE, phases, Shares(temperature))
    assert resumed.indices(step).tolist() == before[-1].tolist()
    counted = Counter(source_of(THREE, np.concatenate([np.zeros(0, dtype=np.int64), *before[:-1]])).tolist())
    assert resumed.consumed(step) == {source.name: counted[number] for number, source in enumerate(THREE)}


@given(st.integers(0, 30), st.sampled_from([1, 2, 4]), st.booleans(), st.sampled_from([1, 2]))
@settings(max_examples=40, deadline=None)
def test_the_samples_of_a_step_do_not_depend_on_the_layout(step, dp_size, packed, micro_batch_size):
    mixed, lengths = mixture(THREE, PHASES), lengths_of(THREE)
    costs = SampleCosts(lengths, lengths * 1.0, lengths * 1.0, 100) if packed else None
    plan = GlobalBatchPlan(175, 3, 8, micro_batch_size, dp_size, costs=costs, mixture=mixed)
    by_rank = [plan.microbatches(step, rank) for rank in range(dp_size)]
    if packed:
        samples = sorted(index for rank in by_rank for pack in rank for index in pack)
        assert samples == sorted(mixed.indices(step).tolist())
    else:
        joined = [index for rounds in zip(*by_rank, strict=True) for indices in rounds for index in indices]
        assert joined == mixed.indices(step).tolist()


def test_a_phase_draws_what_it_allows_in_its_order():
    mixed, lengths = mixture(THREE, PHASES), lengths_of(THREE)
    first = np.concatenate([mixed.indices(step) for step in range(7)])
    assert set(source_of(THREE, first)) == {0} and lengths[first].max() <= 30
    allowed = int((lengths[:60] <= 30).sum())
    assert allowed > 8 and (np.diff(lengths[first[:allowed]]) >= 0).all()
    assert len(set(first[:allowed].tolist())) == allowed
    second = np.concatenate([mixed.indices(step) for step in range(7, 12)])
    assert Counter(source_of(THREE, second).tolist()) == {0: 13, 1: 27} and lengths[second].max() > 30


def test_a_walk_goes_on_in_the_next_phase():
    # Source b: 27 samples in the second phase, and its pass of 25 goes on in the last one; c begins there.
    phases = (Phase(0, (1.0, 2.0, 0.0)), Phase(5, (1.0, 1.0, 3.0)))
    samples_D = walk(mixture(THREE, phases), 25)
    mine = samples_D[source_of(THREE, samples_D) == 1]
    assert len(mine) > 50
    for start in (0, 25):
        assert sorted(mine[start : start + 25]) == list(range(60, 85))


def test_orders_of_passes_seeds_and_sources_differ():
    twins = (Source("a", 50), Source("b", 50))
    orders = set()
    for seed in (0, 1):
        samples_D = walk(mixture(twins, seed=seed, batch_size=20), 10)
        for number in (0, 1):
            mine = samples_D[source_of(twins, samples_D) == number] - 50 * number
            orders |= {tuple(mine[:50]), tuple(mine[50:100])}
    assert len(orders) == 8
    in_order = walk(mixture(twins, shuffle=False, batch_size=20), 5)
    assert in_order[source_of(twins, in_order) == 1].tolist() == list(range(50, 100))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1000.0])
def test_temperature_is_by_size_and_evens_out(temperature):
    sources = (Source("large", 900), Source("small", 100))
    samples_D = walk(mixture(sources, shares=Shares(temperature), batch_size=1000), 1)
    expected = 1000 * 900 ** (1 / temperature) / (900 ** (1 / temperature) + 100 ** (1 / temperature))
    assert abs((source_of(sources, samples_D) == 0).sum() - expected) < 1


def test_tasks_share_a_global_batch_first():
    sources = [Source("a", 9, 3.0, task="ocr"), Source("b", 9, 1.0, task="ocr"), Source("c", 9, 100.0, task="chat")]
    mixed = mixture(sources, shares=Shares(tasks=(("ocr", 1.0), ("chat", 1.0))), batch_size=16)
    for step in range(5):
        assert Counter(source_of(sources, mixed.indices(step)).tolist()) == {0: 6, 1: 2, 2: 8}


def test_epochs_of_sources_are_exact():
    sources = (Source("a", 11, epochs=2.0), Source("b", 30, epochs=0.5), Source("c", 7, epochs=3.0))
    plan = GlobalBatchPlan(48, 3, 4, 1, 1, mixture=mixture(sources, batch_size=4))
    assert plan.num_mixture_steps(1.0, "epochs") == -(-(22 + 15 + 21) // 4)
    samples_D = walk(plan.mixture, 15)[: 22 + 15 + 21]
    seen = Counter(samples_D.tolist())
    assert [seen[sample] for sample in range(11)] == [2] * 11
    assert sorted(seen[sample] for sample in range(11, 41)) == [0] * 15 + [1] * 15
    assert [seen[sample] for sample in range(41, 48)] == [3] * 7


def test_where_a_run_through_the_sources_ends():
    sources = (Source("a", 10, 1.0), Source("b", 60, 3.0))
    mixed = mixture(sources, batch_size=4)
    plan = GlobalBatchPlan(70, 3, 4, 1, 1, mixture=mixed)
    first, every = mixed.num_draws("first_exhausted"), mixed.num_draws("all_exhausted")
    samples_D = walk(mixed, 30)
    assert set(range(10)) <= set(samples_D[:first]) and samples_D[first - 1] < 10
    assert len(set(samples_D[:every])) == 70 > len(set(samples_D[: every - 1]))
    assert plan.num_mixture_steps(1.0, "first_exhausted") == first // 4
    assert plan.num_mixture_steps(2.0, "all_exhausted") == -(-2 * every // 4)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(UseError, match="data.mixture b: got no rows that fit"):
        mixture((Source("a", 3), Source("b", 0)))
    with pytest.raises(
        UseError, match=r"data.mixture a: got a share of 1.0e-07 of the draws; expected at least 9.5e-07"
    ):
        mixture((Source("a", 3, 1e-7), Source("b", 4, 1.0)))
    with pytest.raises(UseError, match="data.curriculum: got no sample of a with at most 2 tokens"):
        mixture((Source("a", 3), Source("b", 4)), (Phase(max_length=2),))
