"""Images of unequal size over 32 ranks: how even the encoder's work is, and how long it takes to decide.

    python -m benchmarks.spreading [--batches 20]

16 images a rank, lognormal numbers of patches, costs by exact FLOPs for two vision towers of 0.6B: one with full
attention (Qwen3-VL's) and one with windows of 64 patches in all but four layers (Qwen2.5-VL's). The proxies that others
use, the number of tokens and its square, are spread the same way and judged by the exact costs.
"""
# ruff: noqa: T201 (a program: it prints)

import argparse
import sys
import time

import numpy as np

from megavlm.data.spread import imbalance, longest_first, spread
from megavlm.models.architecture import VisionArchitecture
from megavlm.planner.flops import tower_flops
from tests.evidence import record, row

NUM_RANKS = 32
IMAGES_A_RANK = 16
NUM_TIMED_IMAGES = 4096
MOST, AIM = 1.02, 1.01
MOST_MS, AIM_MS = 50, 10
FULL_ATTENTION = VisionArchitecture(
    num_layers=27,
    hidden_size=1152,
    ffn_hidden_size=4304,
    num_attention_heads=16,
    activation="gelu_tanh",
    norm_epsilon=1e-6,
    patch_channels=1536,
    merge_size=2,
    num_positions=2304,
)


def full_attention_flops(num_patches: int) -> float:
    """Forward of the Qwen3-VL tower on one image."""
    return float(tower_flops(FULL_ATTENTION, (1, 2, num_patches // 2)))


def windowed_flops(num_patches: int) -> float:
    """Forward of the Qwen2.5-VL tower: 32 gated layers, four of them with full attention, the others within windows."""
    width, mlp = 1280, 3420
    linear = 32 * 2 * num_patches * (4 * width**2 + 3 * width * mlp)
    return linear + 4 * width * num_patches * (4 * num_patches + 28 * min(64, num_patches))


TOWERS = {"full attention": full_attention_flops, "windowed": windowed_flops}


def draw_patches(num_images: int, generator: np.random.Generator) -> np.ndarray:
    """Patches of every image: lognormal, median 1,600, 64 to 16,384."""
    return np.exp(generator.normal(np.log(1600), 0.9, num_images)).clip(64, 16384).astype(np.int64) // 4 * 4


def one_batch(tower: str, generator: np.random.Generator) -> tuple[dict[str, float], float]:
    """(max / mean of each way to spread, the least that the largest image allows)."""
    patches_N = draw_patches(NUM_RANKS * IMAGES_A_RANK, generator)
    costs_N = np.array([TOWERS[tower](int(patches)) for patches in patches_N])
    ways = {
        "random": generator.permutation(len(patches_N)) % NUM_RANKS,
        "by tokens": longest_first(patches_N.astype(float), NUM_RANKS),
        "by tokens squared": longest_first(patches_N.astype(float) ** 2, NUM_RANKS),
        "by exact costs, longest first": longest_first(costs_N, NUM_RANKS),
        "by exact costs, and exchanged": spread(costs_N, NUM_RANKS),
    }
    least = max(1.0, float(costs_N.max() / costs_N.mean() / IMAGES_A_RANK))
    return {name: imbalance(costs_N, ranks_N, NUM_RANKS) for name, ranks_N in ways.items()}, least


def report(tower: str, num_batches: int) -> bool:
    """Print a tower's table and write it down; whether every batch is as even as required."""
    generator = np.random.default_rng(0)
    batches = [one_batch(tower, generator) for _ in range(num_batches)]
    print(
        f"{tower}: {NUM_RANKS} ranks x {IMAGES_A_RANK} images: max / mean over {num_batches} batches, and of the worst"
    )
    means = {name: float(np.mean([ways[name] for ways, _ in batches])) for name in batches[0][0]}
    for name, mean in means.items():
        print(f"  {name:32} {mean:.4f}  {max(ways[name] for ways, _ in batches):.4f}")
    chosen = "by exact costs, and exchanged"
    num_bound = sum(least > 1 for _, least in batches)
    value = max(ways[chosen] / least for ways, least in batches)
    reached = value <= MOST
    print(f"  {'reached' if reached else 'MISSED'}: {value:.4f} in the worst batch, at most {MOST}, aim {AIM}")
    print(f"  in {num_bound} of them the largest image alone is more than the mean; there the least is its cost")
    rows = [
        row(
            f"Images over {NUM_RANKS} ranks, {tower}: {name}",
            mean,
            unit="encoder work of a rank, max / mean",
            reference="random, same images",
            reference_value=means["random"],
            command="make bench-balance",
        )
        for name, mean in means.items()
    ]
    rows.append(
        row(
            f"Images over {NUM_RANKS} ranks, {tower}: worst of {num_batches} batches",
            value,
            unit="encoder work of a rank, max / mean, or / the largest image where that is more",
            required=f"<= {MOST} (aim {AIM})",
            reference="by tokens, worst batch",
            reference_value=max(ways["by tokens"] / least for ways, least in batches),
            command="make bench-balance",
        )
    )
    record("balance", rows)
    return reached


def report_time() -> bool:
    """How long it takes to spread 4,096 images; whether that is short enough."""
    generator = np.random.default_rng(0)
    times_ms = []
    for _ in range(9):
        costs_N = np.array([full_attention_flops(int(p)) for p in draw_patches(NUM_TIMED_IMAGES, generator)])
        start_s = time.perf_counter()
        spread(costs_N, NUM_RANKS)
        times_ms.append(1000 * (time.perf_counter() - start_s))
    time_ms = float(np.median(times_ms))
    reached = time_ms <= MOST_MS
    print(f"{NUM_TIMED_IMAGES} images over {NUM_RANKS} ranks: {time_ms:.1f} ms, at most {MOST_MS}, aim {AIM_MS}")
    written = row(
        f"Images over {NUM_RANKS} ranks: time to spread {NUM_TIMED_IMAGES:,} images",
        time_ms,
        unit="ms",
        required=f"<= {MOST_MS} (aim {AIM_MS})",
        command="make bench-balance",
    )
    record("balance", [written])
    return reached


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; 1 if a required figure is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=20, help="batches of images")
    options = parser.parse_args(arguments)
    reached = [report(tower, options.batches) for tower in TOWERS] + [report_time()]
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
