# ruff: noqa: T201 (a program: it prints)
"""How long training stands still for an asynchronous save, against copying the state in memory.

    python -m benchmarks.saving [--gb 0.4] [--plain]

A LLaVA with random weights takes a step of AdamW in fp32; then saves are begun, each from a copy of weights and both
moments, and each is complete before the next. The yardstick clones the same tensors. Best of several runs. Exit code 1
when the required figure is missed.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import write_large
from tests.evidence import record, row

MOST_RATIO, AIM = 2.0, 1.1
NUM_RUNS = 5


def build(root: Path, gigabytes: float, distributed: bool) -> Any:
    """A run that has taken a step."""
    from megavlm.config.schema import (
        CheckpointConfig,
        DataConfig,
        ModelConfig,
        ParallelConfig,
        Recipe,
        TrainConfig,
    )
    from megavlm.parallel.groups import join_world
    from megavlm.train.state import build_state
    from megavlm.train.step import train_step

    hf_dir = write_large(root / "model", int(gigabytes * 1e9))
    rows = root / "rows.jsonl"
    turns = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a red square"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    recipe = Recipe(
        output_dir=str(root / "runs"),
        model=ModelConfig(hf_dir=str(hf_dir)),
        parallel=ParallelConfig(use_distributed_optimizer=distributed),
        data=DataConfig(train=(str(rows),), max_length=64),
        train=TrainConfig(train_iters=1, precision="fp32", global_batch_size=1),
        checkpoint=CheckpointConfig(async_save=True, keep_last=1),
    )
    join_world(600)
    state = build_state(recipe)
    train_step(state, 0)
    return state


def measure(state: Any) -> tuple[float, float, int]:
    """Least seconds of beginning a save, and of cloning what it copies; bytes of that."""
    from megavlm.train import resume

    stalls, copies, num_bytes = [], [], 0
    for step in range(1, NUM_RUNS + 1):
        state.step = step
        tensors = [
            tensor
            for inner in state.optimizer.chained_optimizers
            for entry in inner.optimizer.state.values()
            for tensor in (entry["exp_avg"], entry["exp_avg_sq"])
        ]
        tensors += [parameter.data for model in state.models for parameter in model.parameters()]
        started_s = time.perf_counter()
        kept = [tensor.clone() for tensor in tensors]
        copies.append(time.perf_counter() - started_s)
        num_bytes = sum(tensor.nbytes for tensor in kept)
        del kept
        started_s = time.perf_counter()
        pending = resume.begin_save(state, copy=True)
        stalls.append(time.perf_counter() - started_s)
        pending.finish()
        del pending
    return min(stalls), min(copies), num_bytes


def main(arguments: list[str] | None = None) -> int:
    """Print the figure; 1 if it is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.4, help="size of the model in bf16, 10^9 bytes (default: 0.4)")
    parser.add_argument("--plain", action="store_true", help="without the distributed optimizer")
    args = parser.parse_args(arguments)
    kind = "plain optimizer" if args.plain else "distributed optimizer"
    from megavlm.platform.start import start

    start()
    with tempfile.TemporaryDirectory() as folder:
        stall_s, copy_s, num_bytes = measure(build(Path(folder), args.gb, not args.plain))
    ratio = stall_s / copy_s
    size = f"{num_bytes / 1e9:.1f} GB"
    print(f"asynchronous save, {kind}: stands still {ratio:.2f} x a copy of {size}, at most {MOST_RATIO:g}")
    record(
        "checkpoint",
        [
            row(
                f"asynchronous save, {kind}, {size} of state: training stands still",
                ratio,
                unit="of copying the state in memory",
                required=f"<= {MOST_RATIO:g} (aim {AIM})",
                reference="copy, s",
                reference_value=copy_s,
                command="make bench-checkpoint",
            )
        ],
    )
    return 0 if ratio <= MOST_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
