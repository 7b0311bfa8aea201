"""Packs of a global batch: how few, and how alike in the work of the encoder and of the language model.

    python -m benchmarks.packing [--batches 5]

PP4 x DP8 x 16 microbatches, packs of 8K tokens filled to 97%, ViT 0.6B + 7B. Compared with arrival order (next fit),
best fit decreasing, and a greedy split by both costs. Where one sample alone is more than the mean of the packs, the
largest load is compared with that sample's: nothing smaller is possible.
"""
# ruff: noqa: T201 (a program: it prints)

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.lengths import PACK_TOKENS, Sample, draw, in_arrival_order, long_tail_samples, real_samples
from benchmarks.models import MODELS, sample_costs
from megavlm.data.balance import SampleCosts, split
from megavlm.data.bin_packing import best_fit_decreasing, fewest_packs, martello_toth_l2
from tests.evidence import record, row

NUM_DATA_RANKS = 8
NUM_PACKS = NUM_DATA_RANKS * 16
MODEL = MODELS["ViT0.6B+7B"]
MOST = {"packs": (1.02, 1.005), "language": (1.035, 1.02), "encoder": (1.05, 1.03)}
"""What is required, and the aim."""
UNITS = {
    "packs": "packs / Martello-Toth L2",
    "language": "language model per microbatch, max / mean",
    "encoder": "encoder per microbatch, max / mean",
}

Packer = Callable[[list[Sample], SampleCosts], np.ndarray]
"""Gives each sample its pack."""


def next_fit(samples: list[Sample], costs: SampleCosts) -> np.ndarray:
    """Arrival order."""
    packs = in_arrival_order(samples, 1)
    return np.repeat(np.arange(len(packs)), [len(pack) for pack in packs])


def best_fit(samples: list[Sample], costs: SampleCosts) -> np.ndarray:
    """By length alone."""
    return best_fit_decreasing(costs.num_tokens_N, PACK_TOKENS)


def greedy(samples: list[Sample], costs: SampleCosts) -> np.ndarray:
    """Costliest first, where the larger of both relative loads stays least; no exchange afterwards."""
    encoder, language = (each / each.sum() * NUM_PACKS for each in (costs.encoder_N, costs.language_N))
    packs_N = np.empty(len(samples), dtype=np.int64)
    load_2K, used_K = np.zeros((2, NUM_PACKS)), np.zeros(NUM_PACKS)
    for index in np.argsort(-(encoder + language), kind="stable"):
        after_K = np.maximum(load_2K[0] + encoder[index], load_2K[1] + language[index])
        fits_K = used_K + costs.num_tokens_N[index] <= PACK_TOKENS
        pack = int(np.where(fits_K, after_K, np.inf).argmin()) if fits_K.any() else int(used_K.argmin())
        packs_N[index] = pack
        load_2K[:, pack] += encoder[index], language[index]
        used_K[pack] += costs.num_tokens_N[index]
    return packs_N


def balanced(samples: list[Sample], costs: SampleCosts) -> np.ndarray:
    """What training uses."""
    packs_N = np.full(len(samples), -1)
    parts = split(costs, NUM_DATA_RANKS)
    for number, pack in enumerate(pack for rank in parts for pack in rank):
        packs_N[list(pack)] = number
    assert (packs_N >= 0).all() and np.bincount(packs_N, weights=costs.num_tokens_N).max() <= PACK_TOKENS
    return packs_N


PACKERS: dict[str, Packer] = {
    "arrival order (next fit)": next_fit,
    "best fit decreasing": best_fit,
    "greedy by both costs": greedy,
    "balanced": balanced,
}


def largest(costs_N: np.ndarray, packs_N: np.ndarray) -> float:
    """Largest load of a pack, over the mean or over the largest sample if that is more."""
    loads_K = np.bincount(packs_N, weights=costs_N)
    return float(loads_K.max() / max(loads_K.mean(), costs_N.max()))


def measure(pool: list[Sample], num_batches: int) -> tuple[dict[str, dict[str, float]], float]:
    """(per packer its three figures, milliseconds of a balanced split): means over global batches."""
    generator = np.random.default_rng(0)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in [*PACKERS, "fewest packs"]}
    times_s = []
    for _ in range(num_batches):
        samples = draw(pool, NUM_PACKS, generator)
        costs = sample_costs(samples, MODEL)
        bound = martello_toth_l2(costs.num_tokens_N, PACK_TOKENS)
        for name, packer in PACKERS.items():
            start_s = time.perf_counter()
            packs_N = packer(samples, costs)
            if packer is balanced:
                times_s.append(time.perf_counter() - start_s)
            found[name].append(
                {
                    "packs": (packs_N.max() + 1) / bound,
                    "language": largest(costs.language_N, packs_N),
                    "encoder": largest(costs.encoder_N, packs_N),
                }
            )
        found["fewest packs"].append({"packs": (fewest_packs(costs.num_tokens_N, PACK_TOKENS).max() + 1) / bound})
    means = {
        name: {key: float(np.mean([batch[key] for batch in batches])) for key in batches[0]}
        for name, batches in found.items()
    }
    return means, 1000 * float(np.median(times_s))


def report(title: str, means: dict[str, dict[str, float]], time_ms: float) -> bool:
    """Print a data set's table and write it down; whether everything required is reached."""
    print(f"{title}: packs / L2 bound, then language model and encoder per microbatch, max / mean")
    for name, figures in means.items():
        print(f"  {name:26} " + "  ".join(f"{figures[key]:.4f}" if key in figures else "      " for key in MOST))
    print(f"  a balanced split takes {time_ms:.0f} ms")
    reached, rows = True, []
    for key, (most, aim) in MOST.items():
        name = "fewest packs" if key == "packs" else "balanced"
        value = means[name][key]
        reached &= value <= most
        print(f"  {'reached' if value <= most else 'MISSED'}: {UNITS[key]} {value:.4f}, at most {most}, aim {aim}")
        rows.append(_row(f"{title}: {name}", key, value, means, f"<= {most} (aim {aim})"))
        for reference in ("arrival order (next fit)", "best fit decreasing", "greedy by both costs"):
            rows.append(_row(f"{title}: {reference}", key, means[reference][key], means, None))
    rows.append(row(f"{title}: time of a balanced split", time_ms, unit="ms", command="make bench-balance"))
    record("balance", rows)
    return reached


def _row(name: str, key: str, value: float, means: dict[str, dict[str, float]], required: str | None) -> dict[str, Any]:
    return row(
        f"Packing, {name}, {key}",
        value,
        unit=UNITS[key],
        required=required,
        reference="arrival order, same samples",
        reference_value=means["arrival order (next fit)"][key],
        command="make bench-balance",
    )


def whole_set(pool: list[Sample]) -> bool:
    """All rows of the real data sets at once: packs over the bound."""
    sizes = np.array([sample.num_tokens for sample in pool])
    bound = martello_toth_l2(sizes, PACK_TOKENS)
    best_fit_ratio = (best_fit_decreasing(sizes, PACK_TOKENS).max() + 1) / bound
    ratio = (fewest_packs(sizes, PACK_TOKENS).max() + 1) / bound
    most, aim = MOST["packs"]
    print(f"all {len(pool)} samples at once: packs / L2 {ratio:.4f}, best fit decreasing {best_fit_ratio:.4f}")
    written = row(
        f"Packing, all {len(pool)} real samples at once: fewest packs",
        float(ratio),
        unit=UNITS["packs"],
        required=f"<= {most} (aim {aim})",
        reference="best fit decreasing",
        reference_value=float(best_fit_ratio),
        command="make bench-balance",
    )
    record("balance", [written])
    return bool(ratio <= most)


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; 1 if a required figure is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=5, help="global batches, averaged")
    options = parser.parse_args(arguments)
    real = real_samples()
    reached = [
        report(title, *measure(pool, options.batches))
        for title, pool in (("real lengths", real), ("long tail", long_tail_samples()))
    ]
    reached.append(whole_set(real))
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
