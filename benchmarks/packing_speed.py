"""Packing by tokens alone: samples a second on one core, packs over their bound, and what alignment pads.

    python -m benchmarks.packing_speed [--samples 1000000]

Best fit decreasing into packs of 8K tokens, on the lengths of real data sets and on a long tail; the yardstick is the
same heuristic with packs in a sorted list (bisection), which gives the same packs. Rows are as long as their samples,
so that all padding is alignment: each sample to twice the context parallel size, a row also to the tensor parallel
size (sequence parallelism) and to 16 tokens (what FP8 matrix products ask for). Exit code 1 when a required figure is
missed.
"""
# ruff: noqa: T201 (a program: it prints)

import argparse
import bisect
import math
import sys
import time
from typing import Any

import numpy as np

from benchmarks.lengths import PACK_TOKENS, long_tail_samples, real_samples
from megavlm.data.bin_packing import best_fit_decreasing, martello_toth_l2
from tests.evidence import record, row

COMMAND = "make bench-data"
LEAST_SPEED, AIM_SPEED = 200_000, 1_000_000
MOST_PADDING = 0.005
SAMPLES_BY_BISECTION = 50_000
"""Its time grows with the square."""
NUM_RUNS = 3
FP8_MULTIPLE = 16
LAYOUTS = {"TP8, FP8": (8, 1), "TP4 x CP2, FP8": (4, 2), "TP2 x CP4, FP8": (2, 4)}


def by_bisection(sizes_N: np.ndarray, capacity: int) -> np.ndarray:
    """Best fit decreasing as it is usually written."""
    rooms: list[tuple[int, int]] = []
    packs_N = np.empty(len(sizes_N), dtype=np.int64)
    for sample in np.argsort(-sizes_N, kind="stable").tolist():
        size = int(sizes_N[sample])
        position = bisect.bisect_left(rooms, (size, -1))
        room, pack = rooms.pop(position) if position < len(rooms) else (capacity, len(rooms))
        packs_N[sample] = pack
        bisect.insort(rooms, (room - size, pack))
    return packs_N


def padding(sizes_N: np.ndarray, tensor: int, context: int) -> float:
    """Share of padding in rows that are packed under a layout's alignment."""
    sample_multiple = 2 * context if context > 1 else 1
    row_multiple = math.lcm(sample_multiple * tensor, FP8_MULTIPLE)
    padded_N = -(-sizes_N // sample_multiple) * sample_multiple
    packs_N = best_fit_decreasing(padded_N, PACK_TOKENS)
    rows = np.bincount(packs_N, weights=padded_N)
    return float(1 - sizes_N.sum() / (np.ceil(rows / row_multiple) * row_multiple).sum())


def measure(title: str, sizes_N: np.ndarray) -> tuple[bool, list[dict[str, Any]]]:
    """Print a data set's figures; whether all that is required is reached, and the rows of evidence."""
    times_s = []
    for _ in range(NUM_RUNS):
        start_s = time.perf_counter()
        packs_N = best_fit_decreasing(sizes_N, PACK_TOKENS)
        times_s.append(time.perf_counter() - start_s)
    speed = len(sizes_N) / min(times_s)
    few_N = sizes_N[:SAMPLES_BY_BISECTION]
    start_s = time.perf_counter()
    expected_N = by_bisection(few_N, PACK_TOKENS)
    reference = len(few_N) / (time.perf_counter() - start_s)
    assert (best_fit_decreasing(few_N, PACK_TOKENS) == expected_N).all()
    ratio = float((packs_N.max() + 1) / martello_toth_l2(sizes_N, PACK_TOKENS))
    name = f"{title}, {len(sizes_N)} samples"
    print(f"{name}: {speed:,.0f} samples/s (bisection, {len(few_N)} samples: {reference:,.0f}); packs / L2 {ratio:.4f}")
    rows = [
        row(
            f"Packing by tokens, {name}: speed",
            speed,
            unit="samples/s",
            required=f">= {LEAST_SPEED} (aim {AIM_SPEED})",
            reference=f"packs in a sorted list, {len(few_N)} samples, same packs",
            reference_value=reference,
            command=COMMAND,
        ),
        row(f"Packing by tokens, {name}: packs", ratio, unit="packs / Martello-Toth L2", command=COMMAND),
    ]
    reached = speed >= LEAST_SPEED
    for layout, sizes in LAYOUTS.items():
        share = padding(sizes_N, *sizes)
        reached &= share <= MOST_PADDING
        print(f"  {layout}: {100 * share:.3f}% padding")
        rows.append(
            row(
                f"Packing by tokens, {name}: padding, {layout}",
                100 * share,
                unit="% of tokens",
                required=f"<= {100 * MOST_PADDING}",
                command=COMMAND,
            )
        )
    return reached, rows


def main(arguments: list[str] | None = None) -> int:
    """Print the figures; 1 if a required one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000, help="of the large sets")
    options = parser.parse_args(arguments)
    generator = np.random.default_rng(0)
    real_N = np.array([sample.num_tokens for sample in real_samples()])
    long_tail_N = np.array([sample.num_tokens for sample in long_tail_samples()])
    sets = {
        "real lengths": real_N,
        "real lengths, drawn": generator.choice(real_N, options.samples),
        "long tail": generator.choice(long_tail_N, options.samples),
    }
    found = [measure(title, sizes_N) for title, sizes_N in sets.items()]
    record("data", [one for _, rows in found for one in rows])
    reached = all(is_reached for is_reached, _ in found)
    print(
        "reached" if reached else "MISSED", f"at least {LEAST_SPEED} samples/s, at most {100 * MOST_PADDING}% padding"
    )
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
