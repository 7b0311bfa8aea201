# ruff: noqa: T201 (a program: it prints)
"""The planner's search against simulating every layout, under the same cost model.

    python -m benchmarks.planner

Two comparisons. A Qwen3-VL of 8B on 32 H100s, with the lengths of real data sets: every layout that divides is
simulated, more than 10,000 of them, with the planner's own split of the layers; those near the best also climb to
better splits with every move simulated in full. And a small model on few GPUs, where every layout is simulated with
every split there is. The search must find as good a plan in a fraction of the time. Exit code 1 when a required figure
is missed.
"""

import argparse
import dataclasses
import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.lengths import LENGTHS
from megavlm.config.inputs import InputSpec
from megavlm.config.schema import DataConfig, Recipe, TrainConfig
from megavlm.models.architecture import Architecture, LanguageArchitecture, VisionArchitecture
from megavlm.planner.hardware import Hardware, find_hardware
from megavlm.planner.layouts import layouts, space_of
from megavlm.planner.plans import Candidate, Plan, bounded, describe, play, simulated, with_counts
from megavlm.planner.search import search
from megavlm.planner.splits import moves
from megavlm.planner.stepcosts import Problem
from megavlm.planner.workload import read_lengths, typical_batch
from tests.evidence import record, row

MAX_LENGTH = 8192
LEAST_LAYOUTS, MOST_REGRET, MOST_TIME_S = 10_000, 0.03, 30.0
NEAR = 0.03
"""Layouts that are so much slower than the best with the planner's split climb to better ones."""
COMMAND = "make bench-balance"

QWEN3_VL_8B = Architecture(
    family="qwen3_vl",
    vision=VisionArchitecture(27, 1152, 4304, 16, "gelu_pytorch_tanh", 1e-6, 1536, 2, 2304, (8, 16, 24)),
    language=LanguageArchitecture(
        num_layers=36,
        hidden_size=4096,
        ffn_hidden_size=12288,
        num_attention_heads=32,
        num_query_groups=8,
        head_dim=128,
        norm_epsilon=1e-6,
        vocab_size=151936,
        max_positions=262144,
        rotary_base=5e6,
        tied_embeddings=False,
        qk_norm=True,
        mrope_section=(24, 20, 20),
        mrope_interleaved=True,
    ),
    inputs=InputSpec(151655, 151936, "dynamic", 16, 2, 2, 0, "mrope"),
)


SMALL = dataclasses.replace(QWEN3_VL_8B, language=dataclasses.replace(QWEN3_VL_8B.language, num_layers=8))


def make_problem(architecture: Architecture, hardware: Hardware, num_gpus: int, global_batch_size: int) -> Problem:
    """What is planned for."""
    recipe = Recipe(
        data=DataConfig(max_length=MAX_LENGTH, packing=True), train=TrainConfig(global_batch_size=global_batch_size)
    )
    samples = read_lengths(LENGTHS, architecture.inputs)
    workload = typical_batch(architecture, samples, global_batch_size, MAX_LENGTH)
    return Problem(workload, recipe, hardware, num_gpus)


def all_candidates(problem: Problem) -> list[Candidate]:
    """Every layout that divides."""
    space = space_of(problem.recipe, problem.num_gpus, problem.hardware.gpus_per_node)
    return bounded(problem, layouts(space, problem.workload.architecture, problem.recipe, Counter()))


@dataclass(frozen=True)
class Exhausted:
    """What simulating everything has found.

    Attributes:
        best: the quickest plan that fits the memory.
        num_layouts: layouts, all simulated.
        num_splits: layouts and splits, all simulated or ruled out by the split's own lower bound.
        loosest: least step time over its lower bound; below 1 a bound is none.
        time_s: on one core.
    """

    best: Plan
    num_layouts: int
    num_splits: int
    loosest: float
    time_s: float


def every_layout(problem: Problem) -> Exhausted:
    """Simulate every layout with the planner's split; those near the best climb to better ones."""
    started_s, limit = time.process_time(), problem.hardware.usable_memory_bytes
    candidates = all_candidates(problem)
    near: list[tuple[Plan, Candidate]] = []
    lowest = loosest = float("inf")
    for candidate in candidates:
        step_s = simulated(problem, candidate)[1].makespan_s + candidate.end.total_s
        loosest = min(loosest, step_s / candidate.bound_s)
        if step_s > lowest * (1 + NEAR):
            continue
        plan = play(problem, candidate)
        if plan.memory.total <= limit:
            near.append((plan, candidate))
            lowest = min(lowest, step_s)
    near = [one for one in near if one[0].step_s <= lowest * (1 + NEAR)]
    climbed = [_climbed(problem, candidate, plan) for plan, candidate in near]
    best = min((plan for plan, _ in climbed), key=lambda plan: plan.step_s)
    num_tried = sum(number for _, number in climbed)
    time_s = time.process_time() - started_s
    return Exhausted(best, len(candidates), len(candidates) + num_tried, loosest, time_s)


def _climbed(problem: Problem, candidate: Candidate, plan: Plan) -> tuple[Plan, int]:
    """The best of all splits that differ by one layer, again and again; and how many were tried."""
    number = 0
    while True:
        start = plan
        for counts in moves(start.counts):
            number += 1
            moved = with_counts(problem, candidate, counts)
            if moved.bound_s < plan.step_s:
                other = play(problem, moved)
                if other.step_s < plan.step_s and other.memory.total <= problem.hardware.usable_memory_bytes:
                    plan = other
        if plan is start:
            return plan, number


def every_split(problem: Problem) -> Exhausted:
    """Every layout with every split of its layers; only what its own lower bound rules out is not simulated."""
    started_s, limit = time.process_time(), problem.hardware.usable_memory_bytes
    num_layers = problem.workload.architecture.language.num_layers
    candidates = sorted(all_candidates(problem), key=lambda one: one.bound_s)
    best: Plan | None = None
    number, loosest = 0, float("inf")
    for candidate in candidates:
        for counts in splits(num_layers, len(candidate.played.counts)):
            number += 1
            one = with_counts(problem, candidate, counts)
            if best is not None and one.bound_s >= best.step_s:
                continue
            plan = play(problem, one)
            loosest = min(loosest, plan.step_s / one.bound_s)
            if plan.memory.total <= limit and (best is None or plan.step_s < best.step_s):
                best = plan
    assert best is not None
    return Exhausted(best, len(candidates), number, loosest, time.process_time() - started_s)


def splits(num_layers: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    """All ways to split layers over stages, of which only the first and the last may be empty."""
    if num_stages == 1:
        yield (num_layers,)
        return
    spare = num_layers + 2  # as if the two ends had one layer more
    for cuts in itertools.combinations(range(1, spare), num_stages - 1):
        ends = (0, *cuts, spare)
        counts = [end - start for start, end in itertools.pairwise(ends)]
        yield (counts[0] - 1, *counts[1:-1], counts[-1] - 1)


def _compare(name: str, problem: Problem, exhausted: Exhausted, is_timed: bool) -> bool:
    """Print and write down; whether the required figures are reached."""
    space = space_of(problem.recipe, problem.num_gpus, problem.hardware.gpus_per_node)
    started_s = time.process_time()
    found = search(problem, space)
    search_s = time.process_time() - started_s
    best = found.plans[0]
    regret = best.step_s / exhausted.best.step_s - 1
    reached = regret <= MOST_REGRET and search_s <= MOST_TIME_S and exhausted.loosest >= 1 - 1e-9
    if is_timed:
        reached = reached and exhausted.num_layouts >= LEAST_LAYOUTS
    print(f"{name}\n  search: {search_s:.1f} s, {found.num_played} of {found.num_layouts} layouts simulated")
    print(f"    {best.step_s:.4f} s: {describe(best.layout)}, layers {best.counts}")
    print(f"  all {exhausted.num_layouts} layouts, {exhausted.num_splits} with splits: {exhausted.time_s:.0f} s")
    print(f"    {exhausted.best.step_s:.4f} s: {describe(exhausted.best.layout)}, layers {exhausted.best.counts}")
    print(f"  least step time over its lower bound: {exhausted.loosest:.4f} (below 1 the bound would be none)")
    verdict = "reached" if reached else "MISSED"
    print(f"  {verdict}: regret {regret:.2%}, at most {MOST_REGRET:.0%}; {search_s:.1f} s, at most {MOST_TIME_S:.0f}")
    reference = f"simulating all {exhausted.num_layouts} layouts, {exhausted.num_splits} with other splits"
    rows = [
        row(
            f"planner, {name}: regret of the search",
            regret,
            unit="step time over the best layout's, less 1, under the cost model",
            required=f"<= {MOST_REGRET} (aim 0.01)",
            reference=reference,
            reference_value=exhausted.best.step_s,
            command=COMMAND,
        )
    ]
    if is_timed:
        rows.append(
            row(
                f"planner, {name}: time of the search",
                search_s,
                unit="s of one core",
                required=f"<= {MOST_TIME_S:.0f} (aim 10)",
                reference=f"{reference}, s",
                reference_value=exhausted.time_s,
                command=COMMAND,
            )
        )
    record("balance", rows)
    return reached


def main(arguments: list[str] | None = None) -> int:
    """Print the figures; 1 if a required one is missed."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    # Little memory and a slow network, so that a pipeline is best and its split matters.
    hardware = find_hardware("h100")
    scarce = dataclasses.replace(find_hardware("h100", memory_gb=40.0), gpus_per_node=1)
    small = make_problem(SMALL, scarce, 4, 32)
    reached = _compare(
        "8 layers of Qwen3-VL 8B on 4 GPUs of 40 GB apart, every split", small, every_split(small), False
    )
    # A workload keeps the batches that it has cut: the search gets its own, so that its time is its own.
    exhausted = every_layout(make_problem(QWEN3_VL_8B, hardware, 32, 128))
    large = make_problem(QWEN3_VL_8B, hardware, 32, 128)
    return 0 if _compare("Qwen3-VL 8B on 32 H100s", large, exhausted, True) and reached else 1


if __name__ == "__main__":
    sys.exit(main())
