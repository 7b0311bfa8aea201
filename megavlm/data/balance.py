"""A global batch split by cost: packs that are alike in the encoder's work and in the language model's.

Equal counts are not equal work: a document page costs the encoder many times what a small picture does, and a long
sample the language model more than two of half its length. All data ranks and all stages of a pipeline wait for the
fullest pack, so both costs are balanced at once, under a cap on the tokens of a pack.

Pure functions of the costs: every rank computes the same split without talking, if it is given the same costs.

Shape suffixes: N samples of a global batch, G groups of them, K packs (data ranks times microbatches), V resources
(encoder, language model).
"""

from dataclasses import dataclass

import numpy as np

from megavlm.data.bin_packing import fewest_packs, martello_toth_l2
from megavlm.data.exchange import even_out, in_even_loads
from megavlm.data.spread import longest_first
from megavlm.errors import use_error

Split = tuple[tuple[tuple[int, ...], ...], ...]
"""[data rank][microbatch]: the numbers of the samples, ascending."""

_GOOD_ENOUGH = 1e-2
"""Above the mean: packs and data ranks that have only so much more are left alone."""


@dataclass(frozen=True, eq=False)
class SampleCosts:
    """What samples cost, and how many tokens a pack may have.

    The unit of the costs does not matter, nor need both be in the same one.

    Attributes:
        num_tokens_N: int64, at least 1: tokens, with what the layout pads each sample to.
        encoder_N: float64, at least 0: vision encoder and projector on the sample's images.
        language_N: float64, at least 0: language model on the sample's tokens.
        packing_length: most tokens of a pack.
    """

    num_tokens_N: np.ndarray
    encoder_N: np.ndarray
    language_N: np.ndarray
    packing_length: int

    def __post_init__(self) -> None:
        """Check that there is a place for every sample.

        Raises:
            UseError: a sample is longer than a pack.
        """
        num_samples = len(self.num_tokens_N)
        assert len(self.encoder_N) == len(self.language_N) == num_samples
        for costs_N in (self.encoder_N, self.language_N):
            assert np.isfinite(costs_N).all() and (costs_N >= 0).all(), "a cost is negative or not finite"
        assert not num_samples or self.num_tokens_N.min() >= 1, "a sample without tokens"
        longest = int(self.num_tokens_N.max(initial=0))
        if longest > self.packing_length:
            raise use_error(
                "data.packing_length",
                self.packing_length,
                f"at least {longest}, the tokens of the longest sample",
                "raise data.packing_length, or lower data.max_length so that long rows are dropped",
            )

    def take(self, indices: np.ndarray) -> "SampleCosts":
        """The costs of some samples, in the order of the indices."""
        return SampleCosts(
            self.num_tokens_N[indices], self.encoder_N[indices], self.language_N[indices], self.packing_length
        )


def split(
    costs: SampleCosts,
    num_data_ranks: int,
    *,
    num_microbatches: int | None = None,
    multiple: int = 1,
    groups_N: np.ndarray | None = None,
) -> Split:
    """Split the samples of a global batch over data ranks and microbatches.

    No pack has more than `packing_length` tokens; every sample is in one pack; a pack is empty only where there are
    fewer samples than packs.

    Args:
        costs: of the samples, in the order of the global batch.
        num_data_ranks: at least 1.
        num_microbatches: of each data rank; None: the fewest that the samples fit into.
        multiple: what `num_microbatches` is a multiple of, if it is to be found (interleaved pipelines).
        groups_N: int64, for each sample what it belongs to: samples of a group are in one pack; None: each is on its
            own.

    Returns:
        The samples of every microbatch of every data rank, within a microbatch in the order of the global batch. So are
        the microbatches of a rank (by their first sample), save its first and last: these are the two whose largest
        images are the smallest, because a pipeline cannot begin before the first one's images are encoded, and ends
        with the last one's.

    Raises:
        UseError: the samples do not fit into so many microbatches, or a group not into a pack.
    """
    if groups_N is not None:
        return _split_groups(costs, groups_N, num_data_ranks, num_microbatches, multiple)
    assert num_data_ranks >= 1 and multiple >= 1 and len(costs.num_tokens_N)
    if num_microbatches is None:
        packs_N, num_packs = _into_fewest(costs, num_data_ranks * multiple)
    else:
        num_packs = num_data_ranks * num_microbatches
        start_N = _start(costs, num_packs)
        if start_N is None:
            raise use_error(
                "data.packing_length",
                f"{costs.packing_length} tokens in each of {num_packs} packs",
                f"room for the {int(costs.num_tokens_N.sum())} tokens of {len(costs.num_tokens_N)} samples",
                "raise data.packing_length, or lower train.global_batch_size",
            )
        packs_N = start_N
    costs_VN = np.stack([costs.encoder_N, costs.language_N]).astype(np.float64)
    packs_N = even_out(
        costs_VN,
        packs_N,
        num_packs,
        sizes_N=costs.num_tokens_N,
        capacity=costs.packing_length,
        tolerance=_GOOD_ENOUGH,
    )
    ranks_K = _deal(costs_VN, packs_N, num_packs, num_data_ranks)
    return _as_split(costs, packs_N, ranks_K, num_data_ranks)


def cost_of_groups(costs: SampleCosts, group_of_N: np.ndarray) -> SampleCosts:
    """Groups in place of samples.

    Args:
        costs: of the samples.
        group_of_N: int64, the group of each sample, from 0; less than 0 of one that belongs to none.

    Raises:
        UseError: a group is longer than a pack.
    """
    tokens_G, encoder_G, language_G = (
        np.bincount(group_of_N[group_of_N >= 0], weights=each_N[group_of_N >= 0])
        for each_N in (costs.num_tokens_N, costs.encoder_N, costs.language_N)
    )
    if tokens_G.max() > costs.packing_length:
        raise use_error(
            "data.packing_length",
            costs.packing_length,
            f"at least {int(tokens_G.max())}, the tokens of all rows of the longest group, which stay together",
            "raise data.packing_length, or lower data.max_length so that long rows are dropped",
        )
    return SampleCosts(tokens_G.astype(np.int64), encoder_G, language_G, costs.packing_length)


def _split_groups(
    costs: SampleCosts, groups_N: np.ndarray, num_data_ranks: int, num_microbatches: int | None, multiple: int
) -> Split:
    """The same with groups in place of samples, in the order of their first samples."""
    _, firsts, found_N = np.unique(groups_N, return_index=True, return_inverse=True)
    place = np.empty(len(firsts), dtype=np.int64)
    place[np.argsort(firsts, kind="stable")] = np.arange(len(firsts))
    group_of_N = place[found_N]
    whole = cost_of_groups(costs, group_of_N)
    parts = split(whole, num_data_ranks, num_microbatches=num_microbatches, multiple=multiple)
    borders = np.cumsum(np.bincount(group_of_N))[:-1]
    members = [part.tolist() for part in np.split(np.argsort(group_of_N, kind="stable"), borders)]
    return tuple(
        tuple(tuple(sorted(sample for group in pack for sample in members[group])) for pack in rank) for rank in parts
    )


def loads(costs: SampleCosts, packs: Split) -> np.ndarray:
    """What every pack costs: float64 [V, data ranks, microbatches]; V are the encoder and the language model."""
    return np.array(
        [
            [[costs_N[list(pack)].sum() for pack in rank] for rank in packs]
            for costs_N in (costs.encoder_N, costs.language_N)
        ]
    )


def _into_fewest(costs: SampleCosts, step: int) -> tuple[np.ndarray, int]:
    """A packing into the least multiple of `step` packs that one is found for, and their number."""
    least = martello_toth_l2(costs.num_tokens_N, costs.packing_length)
    num_packs = -(-least // step) * step
    while True:
        start_N = _start(costs, num_packs)
        if start_N is not None:
            return start_N, num_packs
        num_packs += step


def _start(costs: SampleCosts, num_packs: int) -> np.ndarray | None:
    """A packing into so many packs, int64 [N]: by cost if that fits, else by tokens, else full packs; None: none."""
    for pack in (_by_cost, _by_tokens, _by_filling):
        packs_N = pack(costs, num_packs)
        if packs_N is not None:
            return _fill_empty(packs_N, num_packs)
    return None


def _by_cost(costs: SampleCosts, num_packs: int) -> np.ndarray | None:
    """The costliest sample first, each where the larger of both loads stays least; None if one fits nowhere."""
    encoder_N, language_N = (
        in_even_loads(costs_N.astype(np.float64), num_packs) for costs_N in (costs.encoder_N, costs.language_N)
    )
    encoder_K, language_K = np.zeros(num_packs), np.zeros(num_packs)
    room_K = np.full(num_packs, costs.packing_length)
    packs_N = np.empty(len(encoder_N), dtype=np.int64)
    for sample in np.argsort(-(encoder_N + language_N), kind="stable").tolist():
        after_K = np.maximum(encoder_K + encoder_N[sample], language_K + language_N[sample])
        after_K[room_K < costs.num_tokens_N[sample]] = np.inf
        pack = int(after_K.argmin())
        if after_K[pack] == np.inf:
            return None
        packs_N[sample] = pack
        encoder_K[pack] += encoder_N[sample]
        language_K[pack] += language_N[sample]
        room_K[pack] -= costs.num_tokens_N[sample]
    return packs_N


def _by_tokens(costs: SampleCosts, num_packs: int) -> np.ndarray | None:
    """The longest sample first, each into the pack with the fewest tokens so far; None if one does not fit there."""
    packs_N = longest_first(costs.num_tokens_N, num_packs)
    used_K = np.bincount(packs_N, weights=costs.num_tokens_N, minlength=num_packs)
    return packs_N if used_K.max() <= costs.packing_length else None


def _by_filling(costs: SampleCosts, num_packs: int) -> np.ndarray | None:
    """As few packs as can be found; None if these are too many."""
    packs_N = fewest_packs(costs.num_tokens_N, costs.packing_length)
    return packs_N if packs_N.max() < num_packs else None


def _fill_empty(packs_N: np.ndarray, num_packs: int) -> np.ndarray:
    """Give half of the samples of the packs that have most of them to the packs that have none."""
    counts_K = np.bincount(packs_N, minlength=num_packs)
    for empty in np.flatnonzero(counts_K == 0).tolist():
        donor = int(counts_K.argmax())
        if counts_K[donor] <= 1:  # fewer samples than packs
            break
        given = np.flatnonzero(packs_N == donor)[1::2]
        packs_N[given] = empty
        counts_K[empty] = len(given)
        counts_K[donor] -= len(given)
    return packs_N


def _deal(costs_VN: np.ndarray, packs_N: np.ndarray, num_packs: int, num_data_ranks: int) -> np.ndarray:
    """int64 [K]: the data rank of every pack, as many packs to each, the ranks' totals even in both costs."""
    costs_VK = np.stack([np.bincount(packs_N, weights=row, minlength=num_packs) for row in costs_VN])
    totals_V1 = costs_VK.sum(axis=1, keepdims=True)
    order = np.argsort(-(costs_VK / np.where(totals_V1 > 0, totals_V1, 1)).sum(axis=0), kind="stable")
    # There and back again: first to last rank, then last to first.
    rounds = np.arange(num_packs).reshape(-1, num_data_ranks) % num_data_ranks
    rounds[1::2] = rounds[1::2, ::-1]
    ranks_K = np.empty(num_packs, dtype=np.int64)
    ranks_K[order] = rounds.ravel()
    return even_out(costs_VK, ranks_K, num_data_ranks, keep_counts=True, tolerance=_GOOD_ENOUGH)


def _as_split(costs: SampleCosts, packs_N: np.ndarray, ranks_K: np.ndarray, num_data_ranks: int) -> Split:
    members: list[list[int]] = [[] for _ in ranks_K]
    for sample, pack in enumerate(packs_N.tolist()):
        members[pack].append(sample)
    ranks: list[list[tuple[int, ...]]] = [[] for _ in range(num_data_ranks)]
    # Empty packs come last.
    for pack in sorted(range(len(members)), key=lambda pack: members[pack] or [len(packs_N)]):
        ranks[int(ranks_K[pack])].append(tuple(members[pack]))
    return tuple(_small_images_outside(rank, costs.encoder_N) for rank in ranks)


def _small_images_outside(packs: list[tuple[int, ...]], encoder_N: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Packs of a rank with those of the smallest largest images (of a sample) in front and behind."""
    if len(packs) < 3 or not packs[-1]:
        return tuple(packs)
    largest = [encoder_N[list(pack)].max() for pack in packs]
    order = sorted(range(len(packs)), key=lambda number: (largest[number], number))
    first, last = order[:2]
    return (packs[first], *(packs[number] for number in sorted(order[2:])), packs[last])
