"""What emulated FP8 costs in accuracy: the demo in bf16 and with an FP8 recipe, asked about the same held-out images.

Each run makes the demo's data and model anew from the same seed, trains, exports, and lets transformers answer; so the
whole way is in it that a user of a recipe goes. The exported weights are fp32; FP8 is in the training alone.
Writes docs/evidence/precision.json. Run it through `make bench-precision`.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.evidence import record, row

ROOT = Path(__file__).resolve().parent.parent
MOST_LOST = 0.02
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def demo(name: str, overrides: list[str]) -> dict[str, Any]:
    """Run the demo with a changed recipe; its summary."""
    command = [sys.executable, "examples/demo.py", f"name={name}", *overrides]
    # Its figures are not those of the demo as it is, whose evidence stays; nor has it to be done in time.
    environment = dict(os.environ) | {"MEGAVLM_NO_EVIDENCE": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=False)
    summary: dict[str, Any] = json.loads((ROOT / "runs" / name / "summary.json").read_text(encoding="utf-8"))
    return summary


def main() -> int:
    """Compare; 1 when a recipe loses more than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["delayed", "blockwise"])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the demo's recipe, in all runs")
    args = parser.parse_args()
    plain = demo("demo-bf16", [*args.overrides, "train.precision=bf16"])["exact_match_after"]
    missed = False
    for recipe in args.recipes:
        words = [*args.overrides, "train.precision=fp8_emulated", f"fp8.fp8_recipe={recipe}"]
        found = demo(f"demo-fp8-{recipe}", words)["exact_match_after"]
        missed |= found < plain - MOST_LOST
        rows = [
            row(
                f"demo, emulated FP8 {recipe}: held-out exact match of numbers",
                found,
                unit="share of answers",
                required=f">= {plain - MOST_LOST:.3f} (bf16 less {MOST_LOST:g})",
                reference="bf16",
                reference_value=plain,
                command="make bench-precision",
            )
        ]
        record("precision", rows)
        sys.stdout.write(f"{recipe}: {found:.1%} of the held-out numbers, bf16 {plain:.1%}\n")
        sys.stdout.flush()
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
