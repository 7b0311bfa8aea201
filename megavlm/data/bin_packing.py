"""Samples into as few packs as possible, and the bound below which no packing gets.

Shape suffixes: N samples, S samples of at most half the capacity, A thresholds that the bound tries.
"""

import bisect
import heapq
from collections.abc import Sequence

import numpy as np


def martello_toth_l2(sizes: Sequence[int] | np.ndarray, capacity: int) -> int:
    """Lower bound L2 on the number of packs.

    Martello and Toth, "Lower bounds and reduction procedures for the bin packing problem", Discrete Applied
    Mathematics 28(1), 1990. For a threshold a, samples above capacity - a share a pack with none of at least a; samples
    above half the capacity not with each other; what of the rest does not fit beside these needs further packs. The
    best threshold counts. Never less than the sum over the capacity.

    Args:
        sizes: integers, at least 1 and at most the capacity.
        capacity: of a pack.
    """
    sizes_N = np.sort(np.asarray(sizes, dtype=np.int64))[::-1]
    assert not len(sizes_N) or (sizes_N[-1] >= 1 and sizes_N[0] <= capacity), (sizes_N[-1], sizes_N[0], capacity)
    num_large = int(np.searchsorted(-sizes_N, -capacity / 2, side="left"))
    large_N, small_S = sizes_N[:num_large], sizes_N[num_large:]
    before_large = np.concatenate(([0], np.cumsum(large_N)))
    before_small = np.concatenate(([0], np.cumsum(small_S)))
    thresholds_A = np.concatenate(([0], np.unique(small_S)))
    num_alone_A = np.searchsorted(-large_N, -(capacity - thresholds_A), side="left")
    room_A = (num_large - num_alone_A) * capacity - (before_large[-1] - before_large[num_alone_A])
    rest_A = before_small[np.searchsorted(-small_S, -thresholds_A, side="right")] - room_A
    return num_large + int(np.maximum(0, -(-rest_A // capacity)).max())


def fewest_packs(sizes: Sequence[int] | np.ndarray, capacity: int) -> np.ndarray:
    """About as few packs as possible: best fit decreasing, or, where that misses the bound, packs filled up.

    Args:
        sizes: integers, at least 1 and at most the capacity.
        capacity: of a pack.

    Returns:
        int64 pack of each sample [N], numbered from 0.
    """
    packs_N = best_fit_decreasing(sizes, capacity)
    num_packs = packs_N.max(initial=-1) + 1
    if num_packs > martello_toth_l2(sizes, capacity):
        filled_N = _filled_up(sizes, capacity)
        if filled_N.max() + 1 < num_packs:
            return filled_N
    return packs_N


def best_fit_decreasing(sizes: Sequence[int] | np.ndarray, capacity: int) -> np.ndarray:
    """The usual heuristic: the largest first, each into the fullest pack that has room (at most 11/9 of the fewest).

    Packs are kept by their room, a whole number, and one bit of an integer says which rooms there are: the fullest pack
    that takes a sample is behind the lowest bit from its size on. It takes all samples of this size that it has room
    for, because no other pack has room for one and is fuller.

    Args:
        sizes: integers, at least 1 and at most the capacity.
        capacity: of a pack.

    Returns:
        int64 pack of each sample [N], numbered from 0. Of packs that are as full the first is taken.
    """
    sizes_N = np.asarray(sizes, dtype=np.int64)
    assert not len(sizes_N) or (sizes_N.min() >= 1 and sizes_N.max() <= capacity), (sizes_N.min(), sizes_N.max())
    order_N = np.argsort(-sizes_N, kind="stable")
    descending, counts = np.unique(sizes_N, return_counts=True)
    packs_of_room: dict[int, list[int]] = {}
    """Heaps."""
    rooms, num_packs = 0, 0
    chosen: list[int] = []
    for size, count in zip(descending[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            enough = rooms >> size
            if enough:
                room = size + (enough & -enough).bit_length() - 1
                packs = packs_of_room[room]
                pack = heapq.heappop(packs)
                if not packs:
                    rooms ^= 1 << room
            else:
                room, pack = capacity, num_packs
                num_packs += 1
            taken = min(room // size, count)
            chosen += [pack] * taken
            count -= taken
            room -= taken * size
            heapq.heappush(packs_of_room.setdefault(room, []), pack)
            rooms |= 1 << room
    packs_N = np.empty(len(sizes_N), dtype=np.int64)
    packs_N[order_N] = chosen
    return packs_N


def _filled_up(sizes: Sequence[int] | np.ndarray, capacity: int) -> np.ndarray:
    """One pack after the other, each as full as the samples that are left can make it.

    Each takes the largest sample left and, by subset sums (Gupta and Ho, "A new heuristic algorithm for the
    one-dimensional bin-packing problem", Production Planning and Control 10(6), 1999), those that fill it best; among
    equally good fillings one of the largest samples, because small ones are easier to place later.
    """
    sizes_N = np.asarray(sizes, dtype=np.int64)
    samples = np.argsort(-sizes_N, kind="stable").tolist()
    lengths = sizes_N[samples].tolist()
    packs_N = np.empty(len(sizes_N), dtype=np.int64)
    pack = 0
    while samples:
        for position in reversed([0, *_best_filling(lengths, capacity - lengths[0])]):
            packs_N[samples.pop(position)] = pack
            del lengths[position]
        pack += 1
    return packs_N


def _best_filling(sizes: list[int], room: int) -> list[int]:
    """Positions from 1 on, ascending, of samples that fill the room best; `sizes` descend, position 0 is taken.

    Bit s of a reach is set when some of the samples so far add up to s. The walk ends as soon as the room can be filled
    exactly, so that it uses the largest samples that do.
    """
    mask = (1 << (room + 1)) - 1
    reach, visited, reaches = 1, [], [1]
    previous, num_alike = 0, 0
    for position in range(bisect.bisect_left(sizes, -room, lo=1, key=lambda size: -size), len(sizes)):
        size = sizes[position]
        num_alike = num_alike + 1 if size == previous else 1
        previous = size
        if num_alike * size > room:  # so many of one size do not fit: one more changes nothing
            continue
        reach |= (reach << size) & mask
        visited.append(position)
        reaches.append(reach)
        if reach >> room & 1:
            break
    total = reach.bit_length() - 1
    chosen = []
    for step in range(len(visited) - 1, -1, -1):
        if not reaches[step] >> total & 1:
            chosen.append(visited[step])
            total -= sizes[visited[step]]
    assert total == 0
    return chosen[::-1]
