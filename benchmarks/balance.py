"""Step time of vision-encoder placements over the lower bound total work / ranks, on the lengths of real datasets.

    python -m benchmarks.balance [--trials 3] [--live 8] [--models ViT0.6B+7B ...]    (all at once: make bench-balance)

PP4 x DP8, packs of 8K tokens, encoder and language model both trained; costs in FLOPs (backward twice the forward),
messages cost nothing. Every policy gets the same samples. See data/README.md for where the lengths come from.
"""
# ruff: noqa: T201 (a program: it prints)

import argparse
import csv
import dataclasses
import gzip
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megavlm.pipeline.bubble import bubble
from megavlm.pipeline.costs import StageCosts, stage_costs
from megavlm.pipeline.schedules import first_stage, spread
from megavlm.pipeline.shares import share_images
from megavlm.pipeline.simulate import Simulation, simulate
from tests.evidence import record, row

NUM_RANKS = 4
NUM_DATA_RANKS = 8
PACK_TOKENS = 8192
PATCHES_A_TILE = 1024
LENGTHS = Path(__file__).parent / "data" / "vlm_lengths.csv.gz"


@dataclass(frozen=True)
class Sample:
    """One row of a dataset: image tiles, and tokens in all."""

    num_tiles: int
    num_tokens: int


@dataclass(frozen=True)
class Vit:
    """Vision tower with full attention within a tile."""

    num_layers: int
    width: int
    mlp: int
    gated: bool

    def tile_flops(self) -> float:
        """Forward of one tile."""
        linear = 2 * (4 * self.width**2 + (3 if self.gated else 2) * self.width * self.mlp)
        return self.num_layers * PATCHES_A_TILE * (linear + 4 * PATCHES_A_TILE * self.width)


@dataclass(frozen=True)
class Llm:
    """Language model with grouped-query attention and a gated MLP."""

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    mlp: int
    vocabulary: int

    def layer_flops(self, lengths: list[int]) -> float:
        """Forward of one layer on a pack of causal sequences."""
        head_width = self.width // self.num_heads
        linear = 2 * (2 * self.width**2 + 2 * self.width * self.num_kv_heads * head_width + 3 * self.width * self.mlp)
        return linear * sum(lengths) + 2 * self.width * sum(length**2 for length in lengths)

    def head_flops(self, lengths: list[int]) -> float:
        """Forward of the output layer."""
        return 2 * self.width * self.vocabulary * sum(lengths)


@dataclass(frozen=True)
class Model:
    """Encoder and language model, and the number of microbatches that the step is measured with."""

    vit: Vit
    llm: Llm
    num_microbatches: int
    required: float
    """What the bubble placement must reach with one model chunk a rank."""
    aim: float


VIT_600M = Vit(32, 1280, 3420, True)
MODELS: dict[str, Model] = {
    "ViT0.6B+7B": Model(VIT_600M, Llm(28, 3584, 28, 4, 18944, 152064), 16, 1.08, 1.03),
    "ViT0.6B+32B": Model(VIT_600M, Llm(64, 5120, 40, 8, 27648, 152064), 32, 1.09, 1.05),
    "ViT6B+20B": Model(Vit(45, 3200, 12800, False), Llm(48, 6144, 48, 8, 16384, 92553), 16, 1.07, 1.03),
}


@dataclass(frozen=True)
class Pack:
    """A microbatch as costs. Forward FLOPs."""

    num_tiles: int
    tile: float
    layer: float
    head: float

    @property
    def encoder(self) -> float:
        """Of all tiles."""
        return self.num_tiles * self.tile


def read_samples() -> list[Sample]:
    """All rows, in arrival order."""
    with gzip.open(LENGTHS, "rt", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        return [Sample(int(row["num_tiles"]), min(int(row["num_tokens"]), PACK_TOKENS)) for row in rows]


def arrival_packs(samples: list[Sample]) -> list[list[Sample]]:
    """Next-fit, in arrival order, a multiple of the data ranks (an empty pack may be among them)."""
    packs: list[list[Sample]] = [[]]
    used = 0
    for sample in samples:
        if used + sample.num_tokens > PACK_TOKENS:
            packs.append([])
            used = 0
        packs[-1].append(sample)
        used += sample.num_tokens
    while len(packs) % NUM_DATA_RANKS:
        packs.append([])
    return packs


def balanced_packs(samples: list[Sample], model: Model, num_packs: int) -> list[list[Sample]]:
    """Largest first, into the pack where the larger of both relative loads stays least, under the token cap."""
    encoder = np.array([sample.num_tiles * model.vit.tile_flops() for sample in samples])
    language = np.array([model.llm.num_layers * model.llm.layer_flops([sample.num_tokens]) for sample in samples])
    encoder, language = encoder / encoder.sum() * num_packs, language / language.sum() * num_packs
    packs: list[list[Sample]] = [[] for _ in range(num_packs)]
    load_2K, used_K = np.zeros((2, num_packs)), np.zeros(num_packs)
    for index in np.argsort(-(encoder + language), kind="stable"):
        sample = samples[index]
        after_K = np.maximum(load_2K[0] + encoder[index], load_2K[1] + language[index])
        fits_K = used_K + sample.num_tokens <= PACK_TOKENS
        pack = int(np.where(fits_K, after_K, np.inf).argmin()) if fits_K.any() else int(used_K.argmin())
        packs[pack].append(sample)
        load_2K[0, pack] += encoder[index]
        load_2K[1, pack] += language[index]
        used_K[pack] += sample.num_tokens
    return packs


def costs_of(packs: list[list[Sample]], model: Model) -> list[Pack]:
    """The packs' costs for a model."""
    lengths = [[sample.num_tokens for sample in pack] for pack in packs]
    return [
        Pack(
            sum(sample.num_tiles for sample in pack),
            model.vit.tile_flops(),
            model.llm.layer_flops(tokens),
            model.llm.head_flops(tokens),
        )
        for pack, tokens in zip(packs, lengths, strict=True)
    ]


def total_flops(pack: Pack, model: Model) -> float:
    """Forward of encoder, layers and head."""
    return pack.encoder + model.llm.num_layers * pack.layer + pack.head


def deal(packs: list[Pack], model: Model) -> list[list[Pack]]:
    """Packs to data ranks, as many to each, by total cost: largest first, to the rank that has least."""
    num_each = len(packs) // NUM_DATA_RANKS
    hands: list[list[Pack]] = [[] for _ in range(NUM_DATA_RANKS)]
    loads = [0.0] * NUM_DATA_RANKS
    for pack in sorted(packs, key=lambda pack: -total_flops(pack, model)):
        rank = min((r for r in range(NUM_DATA_RANKS) if len(hands[r]) < num_each), key=loads.__getitem__)
        hands[rank].append(pack)
        loads[rank] += total_flops(pack, model)
    return hands


def split_layers(packs: list[Pack], model: Model, num_chunks: int, encoder_first: bool) -> list[list[int]]:
    """Layers of every [rank][chunk], the largest stage as small as possible, the head (and encoder) counted."""
    layer = float(np.mean([pack.layer for pack in packs]))
    extra = [0.0] * (NUM_RANKS * num_chunks)
    extra[0] = float(np.mean([pack.encoder for pack in packs])) / layer if encoder_first else 0.0
    extra[-1] += float(np.mean([pack.head for pack in packs])) / layer
    counts = [0] * len(extra)
    for _ in range(model.llm.num_layers):
        stage = min(range(len(extra)), key=lambda index: (counts[index] + extra[index], index))
        counts[stage] += 1
    return [[counts[chunk * NUM_RANKS + rank] for chunk in range(num_chunks)] for rank in range(NUM_RANKS)]


def language_RCM(packs: list[Pack], layers: list[list[int]]) -> np.ndarray:
    """Forward FLOPs [ranks, chunks, microbatches]; the last stage has the head."""
    flops = np.array([[[count * pack.layer for pack in packs] for count in row] for row in layers])
    flops[-1, -1] += [pack.head for pack in packs]
    return flops


def step_costs(packs: list[Pack], layers: list[list[int]], encode_RM: np.ndarray) -> StageCosts:
    """Costs of one data rank's step; the encoder's activations are counted in its FLOPs."""
    forward = language_RCM(packs, layers)
    return stage_costs(
        *forward.shape,
        forward_s=forward,
        backward_s=2 * forward,
        encode_forward_s=encode_RM,
        encode_backward_s=2 * encode_RM,
        encoder_live_bytes=encode_RM,
    )


def shared_RM(packs: list[Pack], layers: list[list[int]]) -> np.ndarray:
    """Encoder FLOPs of every rank and microbatch when whole tiles are dealt out."""
    loads = 3 * language_RCM(packs, layers).sum(axis=1).T
    owners = share_images([[3 * pack.tile] * pack.num_tiles for pack in packs], loads.tolist())
    counts = [np.bincount(microbatch, minlength=NUM_RANKS) for microbatch in owners]
    return np.array(counts).T * packs[0].tile


def all_on_first_RM(packs: list[Pack]) -> np.ndarray:
    """Encoder FLOPs of every rank and microbatch when rank 0 has the encoder."""
    encode = np.zeros((NUM_RANKS, len(packs)))
    encode[0] = [pack.encoder for pack in packs]
    return encode


def spread_RM(hands: list[list[Pack]]) -> np.ndarray:
    """The tiles of the global batch over all ranks of all pipelines: the largest share, each microbatch its part."""
    num_tiles = sum(pack.num_tiles for packs in hands for pack in packs)
    largest = -(-num_tiles // (NUM_RANKS * NUM_DATA_RANKS))
    num_microbatches = len(hands[0])
    return np.full((NUM_RANKS, num_microbatches), largest * hands[0][0].tile / num_microbatches)


def slowest(hands: list[list[Pack]], run: Callable[[list[Pack]], Simulation]) -> Simulation:
    """The data rank that all the others wait for."""
    return max((run(packs) for packs in hands), key=lambda simulation: simulation.makespan_s)


@dataclass(frozen=True)
class Row:
    """What is measured of a policy, on the slowest data rank.

    Attributes:
        ratio: makespan over the bound.
        live: encoder activations of the rank with most, in whole microbatches of average size.
    """

    ratio: float
    live: float


def run_trial(model: Model, samples: list[Sample], max_live: dict[int, int]) -> dict[str, Row]:
    """All policies on one global batch; `max_live` has the bubble's bound by model chunks."""
    num_packs = NUM_DATA_RANKS * model.num_microbatches
    arrival = costs_of(arrival_packs(samples), model)
    each = len(arrival) // NUM_DATA_RANKS
    dealt = [arrival[rank * each : (rank + 1) * each] for rank in range(NUM_DATA_RANKS)]
    hands = deal(costs_of(balanced_packs(samples, model, num_packs), model), model)
    packs = [pack for hand in hands for pack in hand]
    bound = 3 * sum(total_flops(pack, model) for pack in packs) / (NUM_RANKS * NUM_DATA_RANKS)
    mean_encoder = sum(pack.encoder for pack in packs) / len(packs)
    even = [[model.llm.num_layers // NUM_RANKS] for _ in range(NUM_RANKS)]
    uneven = split_layers(packs, model, 1, encoder_first=True)

    def on_first(hand: list[Pack], layers: list[list[int]]) -> Simulation:
        schedule = first_stage(NUM_RANKS, len(hand))
        return simulate(schedule, step_costs(hand, layers, all_on_first_RM(hand)))

    found = {
        "A first stage, even layers, arrival order": slowest(dealt, lambda hand: on_first(hand, even)),
        "B first stage, uneven layers": slowest(dealt, lambda hand: on_first(hand, uneven)),
        "C first stage, uneven layers, balanced packs": slowest(hands, lambda hand: on_first(hand, uneven)),
    }
    for num_chunks, live in max_live.items():
        layers = split_layers(packs, model, num_chunks, encoder_first=False)
        found |= planned(model, hands, layers, num_chunks, live)
    return {
        name: Row(result.makespan_s / bound, max(peak.encoder_bytes for peak in result.peak_live) / mean_encoder)
        for name, result in found.items()
    }


def planned(
    model: Model, hands: list[list[Pack]], layers: list[list[int]], num_chunks: int, live: int
) -> dict[str, Simulation]:
    """Spread and bubble, with so many language-model chunks a rank."""
    num_microbatches = len(hands[0])
    everywhere = spread_RM(hands)

    def run_spread(hand: list[Pack], recompute: bool) -> Simulation:
        # Two ways to deal out the images: equal shares over all pipelines, or the bubble's; spread gets the better one.
        schedule = spread(NUM_RANKS, num_microbatches, num_chunks=num_chunks, recompute=recompute)
        ways = [simulate(schedule, step_costs(hand, layers, way)) for way in (everywhere, shared_RM(hand, layers))]
        return min(ways, key=lambda simulation: simulation.makespan_s)

    def run_bubble(hand: list[Pack], recompute: bool) -> Simulation:
        costs = step_costs(hand, layers, shared_RM(hand, layers))
        assert math.isclose(costs.work_s, sum(3 * total_flops(pack, model) for pack in hand)), "work was lost"
        schedule = bubble(
            NUM_RANKS,
            num_microbatches,
            costs,
            max_live_encoder=live,
            num_chunks=num_chunks,
            recompute=recompute,
        )
        return simulate(schedule, costs)

    suffix = f", {num_chunks} chunks" if num_chunks > 1 else ""
    return {
        f"D spread{suffix}": slowest(hands, lambda hand: run_spread(hand, False)),
        f"D' spread, encoded twice{suffix}": slowest(hands, lambda hand: run_spread(hand, True)),
        f"E bubble, bound {live}{suffix}": slowest(hands, lambda hand: run_bubble(hand, False)),
        f"E' bubble, encoded twice{suffix}": slowest(hands, lambda hand: run_bubble(hand, True)),
    }


def draw(pool: list[Sample], model: Model, generator: np.random.Generator) -> list[Sample]:
    """A global batch: as many samples as fill the packs to 97%."""
    wanted = 0.97 * NUM_DATA_RANKS * model.num_microbatches * PACK_TOKENS
    samples: list[Sample] = []
    tokens = 0
    while tokens < wanted:
        samples.append(pool[int(generator.integers(len(pool)))])
        tokens += samples[-1].num_tokens
    return samples


def report(name: str, model: Model, trials: list[dict[str, Row]]) -> bool:
    """Print a model's table; whether the required figure is reached."""
    print(f"{name}, PP{NUM_RANKS} x DP{NUM_DATA_RANKS} x {model.num_microbatches} microbatches, {len(trials)} batches")
    ratios = {policy: float(np.mean([trial[policy].ratio for trial in trials])) for policy in trials[0]}
    for policy, ratio in ratios.items():
        live = max(trial[policy].live for trial in trials)
        print(f"  {policy:46} {ratio:.3f}   encoder activations of {live:.1f} microbatches on the fullest rank")
    bubble_ratio = next(ratio for policy, ratio in ratios.items() if policy.startswith("E bubble"))
    reached = bubble_ratio <= model.required and bubble_ratio < ratios["D spread"]
    record("balance", evidence(name, model, ratios))
    verdict = "reached" if reached else "MISSED"
    print(f"  {verdict}: bubble {bubble_ratio:.3f}, at most {model.required} and below spread; the aim is {model.aim}")
    return reached


def evidence(name: str, model: Model, ratios: dict[str, float]) -> list[dict[str, Any]]:
    """Rows for docs/evidence: what each policy reaches, the bubble's with what is required of it."""
    return [
        row(
            f"{name}, {model.num_microbatches} microbatches: {policy}",
            ratio,
            unit="simulated step time / (total work / ranks)",
            required=f"<= {model.required} (aim {model.aim})" if policy.startswith("E bubble, bound 8") else None,
            reference="D spread, same samples",
            reference_value=ratios["D spread"],
            command="make bench-balance",
        )
        for policy, ratio in ratios.items()
    ]


def main() -> int:
    """Print the tables; 1 if a required figure is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=3, help="global batches, averaged")
    parser.add_argument("--live", type=int, default=8, help="bound on microbatches with encoder activations, a rank")
    parser.add_argument("--live-chunks", type=int, default=12, help="the same with two model chunks a rank")
    parser.add_argument("--microbatches", type=int, help="a data rank, for all models")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    options = parser.parse_args()
    pool = read_samples()
    all_reached = True
    for name in options.models:
        model = MODELS[name]
        if options.microbatches:
            model = dataclasses.replace(model, num_microbatches=options.microbatches)
        generator = np.random.default_rng(0)
        max_live = {1: options.live, 2: options.live_chunks}
        trials = [run_trial(model, draw(pool, model, generator), max_live) for _ in range(options.trials)]
        all_reached &= report(name, model, trials)
    return 0 if all_reached else 1


if __name__ == "__main__":
    sys.exit(main())
