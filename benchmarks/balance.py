"""Step time of vision-encoder placements over the lower bound total work / ranks, on real and synthetic lengths.

    python -m benchmarks.balance [--trials 3] [--live 8] [--models ViT0.6B+7B ...]    (all at once: make bench-balance)

PP4 x DP8, packs of 8K tokens, encoder and language model both trained; costs in FLOPs (backward twice the forward),
messages cost nothing. Every policy gets the same samples. See data/README.md and lengths.py for where they come from.
"""
# ruff: noqa: T201 (a program: it prints)

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.lengths import Sample, draw, in_arrival_order, long_tail_samples, real_samples
from benchmarks.models import MODELS, Model, Pack, pack_costs, sample_costs, total_flops
from megavlm.data.balance import split
from megavlm.data.spread import spread as spread_images
from megavlm.pipeline.costs import StageCosts, stage_costs
from megavlm.pipeline.schedules import first_stage, spread
from megavlm.pipeline.shares import share_and_place, share_images, shares_RM
from megavlm.pipeline.simulate import Simulation, simulate
from tests.evidence import record, row

NUM_RANKS = 4
NUM_DATA_RANKS = 8


def split_into_packs(samples: list[Sample], model: Model) -> list[list[Pack]]:
    """What training does: packs alike in both costs, as many to each data rank."""
    parts = split(sample_costs(samples, model), NUM_DATA_RANKS, num_microbatches=model.num_microbatches)
    return [[pack_costs([samples[index] for index in pack], model) for pack in rank] for rank in parts]


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
    """Encoder FLOPs of every rank and microbatch when whole images (or tiles) are dealt out."""
    loads = 3 * language_RCM(packs, layers).sum(axis=1).T
    owners = share_images([[3 * image for image in pack.images] for pack in packs], loads.tolist())
    return shares_RM([pack.images for pack in packs], owners, NUM_RANKS)


def all_on_first_RM(packs: list[Pack]) -> np.ndarray:
    """Encoder FLOPs of every rank and microbatch when rank 0 has the encoder."""
    encode = np.zeros((NUM_RANKS, len(packs)))
    encode[0] = [pack.encoder for pack in packs]
    return encode


def spread_RM(hands: list[list[Pack]]) -> np.ndarray:
    """The images of the global batch over all ranks of all pipelines: the largest share, each microbatch its part."""
    images = np.array([image for packs in hands for pack in packs for image in pack.images])
    num_ranks = NUM_RANKS * NUM_DATA_RANKS
    largest = np.bincount(spread_images(images, num_ranks), weights=images, minlength=num_ranks).max()
    return np.full((NUM_RANKS, len(hands[0])), largest / len(hands[0]))


def slowest(hands: list[list[Pack]], run: Callable[[list[Pack]], Simulation]) -> Simulation:
    """The data rank that all the others wait for."""
    return max((run(packs) for packs in hands), key=lambda simulation: simulation.makespan_s)


@dataclass(frozen=True)
class Row:
    """What is measured of a policy, on the slowest data rank.

    Attributes:
        ratio: makespan over the bound.
        live: encoder activations of the rank with most, in whole microbatches of average size.
        llm_live: microbatches of which the rank with most holds the language model's, each chunk counted.
    """

    ratio: float
    live: float
    llm_live: int


def run_trial(model: Model, samples: list[Sample], live: int, live_chunks: int) -> dict[str, Row]:
    """All policies on one global batch.

    Args:
        model: whose costs.
        samples: the batch.
        live: bound of the bubble placement.
        live_chunks: its bound with two model chunks a rank, where more microbatches are in flight.
    """
    arrival = [pack_costs(pack, model) for pack in in_arrival_order(samples, NUM_DATA_RANKS)]
    each = len(arrival) // NUM_DATA_RANKS
    dealt = [arrival[rank * each : (rank + 1) * each] for rank in range(NUM_DATA_RANKS)]
    hands = split_into_packs(samples, model)
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
    one, two = (split_layers(packs, model, num_chunks, encoder_first=False) for num_chunks in (1, 2))
    found |= spreads(hands, one) | spreads(hands, two)
    found |= {
        f"E bubble, bound {live}": bubbles(model, hands, one, live),
        f"E bubble, bound {live}, one more in flight": bubbles(model, hands, one, live, extra_in_flight=1),
        f"E bubble, bound {2 * live}, one more in flight": bubbles(model, hands, one, 2 * live, extra_in_flight=1),
        "E' bubble, encoded twice": bubbles(model, hands, one, live, recompute=True),
        f"E bubble, bound {live_chunks}, 2 chunks": bubbles(model, hands, two, live_chunks),
        "E' bubble, encoded twice, 2 chunks": bubbles(model, hands, two, live_chunks, recompute=True),
    }
    return {
        name: Row(
            result.makespan_s / bound,
            max(peak.encoder_bytes for peak in result.peak_live) / mean_encoder,
            max(peak.llm_microbatches for peak in result.peak_live),
        )
        for name, result in found.items()
    }


def spreads(hands: list[list[Pack]], layers: list[list[int]]) -> dict[str, Simulation]:
    """The encoder's work spread over all ranks before the language model starts, kept or encoded twice."""
    num_chunks = len(layers[0])
    everywhere = spread_RM(hands)

    def run(hand: list[Pack], recompute: bool) -> Simulation:
        # Two ways to deal out the images: equal shares over all pipelines, or the bubble's; spread gets the better one.
        schedule = spread(NUM_RANKS, len(hand), num_chunks=num_chunks, recompute=recompute)
        ways = [simulate(schedule, step_costs(hand, layers, way)) for way in (everywhere, shared_RM(hand, layers))]
        return min(ways, key=lambda simulation: simulation.makespan_s)

    suffix = f", {num_chunks} chunks" if num_chunks > 1 else ""
    return {
        f"D spread{suffix}": slowest(hands, lambda hand: run(hand, False)),
        f"D' spread, encoded twice{suffix}": slowest(hands, lambda hand: run(hand, True)),
    }


def bubbles(
    model: Model,
    hands: list[list[Pack]],
    layers: list[list[int]],
    live: int,
    *,
    recompute: bool = False,
    extra_in_flight: int = 0,
) -> Simulation:
    """The encoder's work in the pipeline's bubbles, planned as training plans it for each step."""

    def run(hand: list[Pack]) -> Simulation:
        planned = share_and_place(
            [pack.images for pack in hand],
            step_costs(hand, layers, np.zeros((NUM_RANKS, len(hand)))),
            max_live_encoder=live,
            recompute=recompute,
            extra_in_flight=extra_in_flight,
        )
        work = sum(3 * total_flops(pack, model) for pack in hand)
        assert math.isclose(planned.costs.work_s, work), "work was lost"
        costs = dataclasses.replace(planned.costs, encoder_live_bytes_RM=planned.costs.encode_forward_s_RM)
        return simulate(planned.schedule, costs)

    return slowest(hands, run)


def report(name: str, model: Model, trials: list[dict[str, Row]]) -> bool:
    """Print a model's table; whether the required figure is reached."""
    print(f"{name}, PP{NUM_RANKS} x DP{NUM_DATA_RANKS} x {model.num_microbatches} microbatches, {len(trials)} batches")
    ratios = {policy: float(np.mean([trial[policy].ratio for trial in trials])) for policy in trials[0]}
    for policy, ratio in ratios.items():
        live = max(trial[policy].live for trial in trials)
        llm_live = max(trial[policy].llm_live for trial in trials)
        print(f"  {policy:46} {ratio:.3f}   activations alive: encoder {live:4.1f}, language model {llm_live:2}")
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
            required=f"<= {model.required} (aim {model.aim})" if policy == "E bubble, bound 8" else None,
            reference="D spread, same samples",
            reference_value=ratios["D spread"],
            command="make bench-balance",
        )
        for policy, ratio in ratios.items()
    ]


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; 1 if a required figure is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=3, help="global batches, averaged")
    parser.add_argument("--live", type=int, default=8, help="bound on microbatches with encoder activations, a rank")
    parser.add_argument("--live-chunks", type=int, default=12, help="the same with two model chunks a rank")
    parser.add_argument("--microbatches", type=int, help="a data rank, for all models")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--lengths", nargs="+", choices=["real", "long tail"], default=["real", "long tail"])
    options = parser.parse_args(arguments)
    all_reached = True
    for lengths in options.lengths:
        pool = real_samples() if lengths == "real" else long_tail_samples()
        for name in options.models:
            model = MODELS[name]
            if options.microbatches:
                model = dataclasses.replace(model, num_microbatches=options.microbatches)
            generator = np.random.default_rng(0)
            batches = [draw(pool, NUM_DATA_RANKS * model.num_microbatches, generator) for _ in range(options.trials)]
            trials = [run_trial(model, batch, options.live, options.live_chunks) for batch in batches]
            all_reached &= report(name if lengths == "real" else f"{name}, {lengths}", model, trials)
    return 0 if all_reached else 1


if __name__ == "__main__":
    sys.exit(main())
