"""Which of many items is like an earlier one, by the Hamming distance of their hashes, without comparing all pairs.

Hashes that differ in at most d bits agree wholly in at least one of d + 1 pieces that they are cut into; only items
that agree in a piece are compared (Manku, Jain and Das Sarma, "Detecting near-duplicates for web crawling", WWW
2007).

Shape suffixes: N items, U different hashes, B bytes of a hash, M pairs.
"""

import numpy as np

from megavlm.errors import use_error

MAX_DISTANCE = 32
"""With more, pieces of 256 bits would be so short that most items agree in one."""
_POPCOUNT = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint16)


def first_alike(hashes_NB: np.ndarray, max_distance: int) -> np.ndarray:
    """For each item the first one that it is like and that is itself like no earlier one; itself where there is none.

    Args:
        hashes_NB: uint8 hashes.
        max_distance: most bits in which items that are alike differ.

    Returns:
        int64 [N]: numbers of items.

    Raises:
        UseError: a distance that is out of range.
    """
    if not 0 <= max_distance <= MAX_DISTANCE:
        raise use_error("--max-distance", max_distance, f"0 to {MAX_DISTANCE} bits", "choose a number in between")
    num_items = len(hashes_NB)
    if not num_items:
        return np.zeros(0, dtype=np.int64)
    _, first_U, kind_N = np.unique(hashes_NB, axis=0, return_index=True, return_inverse=True)
    # Numbered in the order in which they appear first, so that "earlier" is "less".
    order_U = np.argsort(first_U)
    first_U = first_U[order_U]
    rank_U = np.empty_like(order_U)
    rank_U[order_U] = np.arange(len(order_U))
    kept_U = np.arange(len(first_U))
    for earlier, later in near_pairs(hashes_NB[first_U], max_distance).tolist():
        if kept_U[earlier] == earlier and kept_U[later] == later:
            kept_U[later] = earlier
    origins_N: np.ndarray = first_U[kept_U[rank_U[kind_N.reshape(-1)]]]
    return origins_N.astype(np.int64)


def near_pairs(hashes_NB: np.ndarray, max_distance: int) -> np.ndarray:
    """All pairs that differ in at most so many bits: int64 [M, 2], the lesser number first, by the greater, then the
    lesser.
    """
    num_items, num_bytes = hashes_NB.shape
    bits_NL = np.unpackbits(hashes_NB, axis=1)
    found = [np.zeros((0, 2), dtype=np.int64)]
    for piece in np.array_split(np.arange(8 * num_bytes), max_distance + 1):
        keys_N = _keys(bits_NL[:, piece])
        order_N = np.argsort(keys_N, kind="stable")
        sorted_N = keys_N[order_N]
        starts, shift = np.arange(num_items), 1
        while True:  # pairs of neighbours, then those with one item between them, as long as some agree in the piece
            starts = starts[starts + shift < num_items]
            starts = starts[sorted_N[starts] == sorted_N[starts + shift]]
            if not len(starts):
                break
            pairs_M2 = np.stack([order_N[starts], order_N[starts + shift]], axis=1)
            differing_MB = hashes_NB[pairs_M2[:, 0]] ^ hashes_NB[pairs_M2[:, 1]]
            found.append(pairs_M2[_POPCOUNT[differing_MB].sum(axis=1) <= max_distance])
            shift += 1
    pairs_M2 = np.unique(np.sort(np.concatenate(found), axis=1), axis=0)
    ordered: np.ndarray = pairs_M2[np.lexsort((pairs_M2[:, 0], pairs_M2[:, 1]))]
    return ordered


def _keys(bits_NL: np.ndarray) -> np.ndarray:
    """Numbers for rows of bits, the same where they are the same."""
    packed_NB = np.packbits(bits_NL, axis=1)
    if packed_NB.shape[1] <= 8:
        padded_NB = np.pad(packed_NB, ((0, 0), (0, 8 - packed_NB.shape[1])))
        return np.ascontiguousarray(padded_NB).view(np.uint64)[:, 0]
    _, keys_N = np.unique(packed_NB, axis=0, return_inverse=True)
    return keys_N.reshape(-1)
