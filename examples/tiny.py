"""A tiny random model of any family, and handwriting to train it on: what `examples/recipes/tiny_*.yaml` start from.

    python -m examples.tiny qwen3_vl_moe
    megavlm train examples/recipes/tiny_qwen3_vl_moe.yaml --nproc 2

To see a family at work, or to try a layout, in a minute on a CPU; such a model learns little. It is written to
runs/tiny/<family>, the rows to runs/tiny/data.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from examples.data.handwriting import write_dataset  # noqa: E402
from tests.parity.composed import ComposedReference  # noqa: E402
from tests.tiny import write_tiny_llava, write_tiny_qwen3vl, write_tiny_qwen3vl_moe  # noqa: E402
from tests.tiny_anyres import write_tiny_llava_next, write_tiny_llava_onevision  # noqa: E402
from tests.tiny_internvl import write_tiny_internvl  # noqa: E402
from tests.tiny_qwen2_5_vl import write_tiny_qwen2_5_vl  # noqa: E402

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "qwen3_vl": write_tiny_qwen3vl,
    "qwen3_vl_moe": write_tiny_qwen3vl_moe,
    "qwen2_5_vl": write_tiny_qwen2_5_vl,
    "internvl": write_tiny_internvl,
    "llava": write_tiny_llava,
    "llava_next": write_tiny_llava_next,
    "llava_onevision": write_tiny_llava_onevision,
    "composed": lambda folder: ComposedReference("perceiver").write(folder),
}
NUM_TRAIN, NUM_HELDOUT = 400, 16


def write(family: str, folder: Path) -> None:
    """Write the model into `folder`/<family>, and the rows, if they are not there, into `folder`/data."""
    shutil.rmtree(folder / family, ignore_errors=True)
    FAMILIES[family](folder / family)
    if not (folder / "data").exists():
        write_dataset(folder / "data", NUM_TRAIN, NUM_HELDOUT, seed=0)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    write(parser.parse_args().family, ROOT / "runs" / "tiny")


if __name__ == "__main__":
    main()
