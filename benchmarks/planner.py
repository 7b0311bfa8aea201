# ruff: noqa: T201 (a program: it prints)
"""The planner's search against playing every layout, under the same cost model.

    python -m benchmarks.planner

A Qwen3-VL of 8B on H100s, with the lengths of real data sets. Every layout that divides is simulated, more than 10,000
of them; the search must find as good a one in a fraction of the time. Exit code 1 when a required figure is missed.
"""

import argparse
import sys
import time
from collections import Counter

from benchmarks.lengths import LENGTHS
from megavlm.config.inputs import InputSpec
from megavlm.config.schema import DataConfig, Recipe, TrainConfig
from megavlm.models.architecture import Architecture, LanguageArchitecture, VisionArchitecture
from megavlm.planner.hardware import find_hardware
from megavlm.planner.layouts import layouts, space_of
from megavlm.planner.search import bounded, describe, play, search
from megavlm.planner.stepcosts import Problem
from megavlm.planner.workload import read_lengths, typical_batch
from tests.evidence import record, row

NUM_GPUS, GLOBAL_BATCH_SIZE, MAX_LENGTH = 32, 128, 8192
LEAST_LAYOUTS, MOST_REGRET, MOST_TIME_S = 10_000, 0.03, 30.0
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


def make_problem() -> Problem:
    """What is planned for."""
    recipe = Recipe(
        data=DataConfig(max_length=MAX_LENGTH, packing=True), train=TrainConfig(global_batch_size=GLOBAL_BATCH_SIZE)
    )
    samples = read_lengths(LENGTHS, QWEN3_VL_8B.inputs)
    workload = typical_batch(QWEN3_VL_8B, samples, GLOBAL_BATCH_SIZE, MAX_LENGTH)
    return Problem(workload, recipe, find_hardware("h100"), NUM_GPUS)


def main(arguments: list[str] | None = None) -> int:
    """Print the figures; 1 if a required one is missed."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    problem = make_problem()
    space = space_of(problem.recipe, NUM_GPUS, problem.hardware.gpus_per_node)
    started_s = time.process_time()
    found = search(problem, space)
    search_s = time.process_time() - started_s
    best = found.plans[0]
    print(f"search: {search_s:.1f} s, {found.num_played} of {found.num_layouts} layouts simulated")
    print(f"  {describe(best.layout)}: {best.step_s:.4f} s")
    started_s = time.process_time()
    candidates = bounded(make_problem(), layouts(space, QWEN3_VL_8B, problem.recipe, Counter()))
    limit = problem.hardware.usable_memory_bytes
    lowest, loosest, name = float("inf"), float("inf"), ""
    for candidate in candidates:
        plan = play(problem, candidate)
        loosest = min(loosest, plan.step_s / candidate.bound_s)
        if plan.memory.total <= limit and plan.step_s < lowest:
            lowest, name = plan.step_s, describe(plan.layout)
    all_s = time.process_time() - started_s
    regret = best.step_s / lowest - 1
    print(f"all {len(candidates)} layouts simulated: {all_s:.0f} s\n  {name}: {lowest:.4f} s")
    print(f"  least step time over its lower bound: {loosest:.4f} (below 1 the search could miss the best)")
    reached = regret <= MOST_REGRET and search_s <= MOST_TIME_S and len(candidates) >= LEAST_LAYOUTS
    verdict = "reached" if reached else "MISSED"
    print(f"{verdict}: regret {regret:.2%}, at most {MOST_REGRET:.0%}; {search_s:.1f} s, at most {MOST_TIME_S:.0f}")
    reference = f"simulating all {len(candidates)} layouts"
    record(
        "balance",
        [
            row(
                "planner, Qwen3-VL 8B on 32 H100s: regret of the search",
                regret,
                unit="step time over the best layout's, less 1, under the cost model",
                required=f"<= {MOST_REGRET} (aim 0.01)",
                reference=reference,
                reference_value=lowest,
                command=COMMAND,
            ),
            row(
                "planner, Qwen3-VL 8B on 32 H100s: time of the search",
                search_s,
                unit="s of one core",
                required=f"<= {MOST_TIME_S:.0f} (aim 10)",
                reference=f"{reference}, s",
                reference_value=all_s,
                command=COMMAND,
            ),
        ],
    )
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
