"""Several files of rows as one, in stated shares."""

import random
from collections.abc import Sequence

from megavlm.errors import use_error


def shares_of(sizes: Sequence[int], weights: Sequence[float] = (), temperature: float = 1.0) -> list[float]:
    """The share of each source.

    In proportion to weight^(1 / temperature); without weights, to the number of rows (mT5, arXiv 2010.11934, section
    3.2: a temperature above 1 gives more to small sources).

    Args:
        sizes: rows of each source.
        weights: of the sources; empty: their sizes.
        temperature: more than 0.

    Raises:
        UseError: weights that are no weights, or another number of them.
    """
    if weights and len(weights) != len(sizes):
        raise use_error("--weights", f"{len(weights)} of them", f"{len(sizes)}, one a file", "give each file a weight")
    if temperature <= 0:
        raise use_error("--temperature", temperature, "more than 0", "use 1 for the weights as they are")
    wanted = [float(weight) for weight in weights or sizes]
    if any(not 0 <= weight < float("inf") for weight in wanted) or not any(wanted):
        raise use_error("--weights", wanted, "numbers of at least 0, not all of them 0", "correct them")
    largest = max(wanted)
    powers = [(weight / largest) ** (1 / temperature) for weight in wanted]
    return [power / sum(powers) for power in powers]


def counts_of(shares: Sequence[float], sizes: Sequence[int], num_rows: int = 0) -> list[int]:
    """Rows of each source.

    Args:
        shares: of the sources; their sum is 1.
        sizes: rows that each has.
        num_rows: of the mixture; 0: as many as there can be without a row that is there twice.
    """
    if not num_rows:
        num_rows = int(min(size / share for size, share in zip(sizes, shares, strict=True) if share) + 1e-9)
    counts = [int(num_rows * share + 1e-9) for share in shares]
    # What is left by rounding goes to the largest remainders.
    order = sorted(range(len(shares)), key=lambda source: counts[source] - num_rows * shares[source])
    for source in order[: num_rows - sum(counts)]:
        counts[source] += 1
    return counts


def draw(counts: Sequence[int], sizes: Sequence[int], seed: int) -> list[tuple[int, int]]:
    """(source, row) of the mixture, in its order; the same for the same arguments.

    A source that gives more rows than it has gives each as often as any other, or once more.

    Args:
        counts: rows of each source in the mixture.
        sizes: rows that each has.
        seed: of choice and order.
    """
    chosen: list[tuple[int, int]] = []
    for source, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        chance = random.Random(f"{seed} {source}")
        rows = list(range(size)) * (count // size) + chance.sample(range(size), count % size)
        chosen += [(source, row) for row in rows]
    random.Random(seed).shuffle(chosen)
    return chosen
