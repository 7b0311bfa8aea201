# ruff: noqa: T201 (a program: it prints)
"""Conversion against reading and writing the same bytes, on the same disk.

    python -m benchmarks.checkpoint [--gb 4]

A LLaVA with random weights in bf16 is imported and exported by `megavlm convert`, each in a process of its own; the
yardstick copies its file in blocks of 8 MB. Each begins with a disk that has nothing left to write, and ends when its
bytes are on the disk. Best of several runs, since disks are shared. Exit code 1 when a required figure is missed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.evidence import record, row
from tests.tiny import write_tiny_llava

LEAST_RATIO, AIM = 0.5, 0.8
NUM_RUNS = 3
BLOCK_BYTES = 8 * 2**20
COMMAND = "make bench-checkpoint"


def write_large(folder: Path, num_bytes: int) -> Path:
    """A LLaVA with as many decoder layers as fill the bytes."""
    write_tiny_llava(folder, num_layers=1)
    config = json.loads((folder / "config.json").read_text())
    hidden, ffn, vocab = 2048, 8192, 32000
    layer_bytes = 2 * (4 * hidden * hidden + 3 * hidden * ffn)
    num_layers = max(1, (num_bytes - 4 * vocab * hidden) // layer_bytes)
    text = config["text_config"]
    text |= {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": num_layers}
    text |= {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 64}
    config["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {
        "language_model.model.embed_tokens.weight": (vocab, hidden),
        "language_model.lm_head.weight": (vocab, hidden),
        "language_model.model.norm.weight": (hidden,),
        "multi_modal_projector.linear_1.weight": (hidden, 32),
        "multi_modal_projector.linear_1.bias": (hidden,),
        "multi_modal_projector.linear_2.weight": (hidden, hidden),
        "multi_modal_projector.linear_2.bias": (hidden,),
    }
    for number in range(num_layers):
        layer = f"language_model.model.layers.{number}."
        shapes |= {f"{layer}self_attn.{x}_proj.weight": (hidden, hidden) for x in "qkvo"}
        shapes |= {f"{layer}mlp.{x}_proj.weight": (ffn, hidden) for x in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (hidden, ffn)}
        shapes |= {f"{layer}{x}_layernorm.weight": (hidden,) for x in ("input", "post_attention")}
    small = load_file(folder / "model.safetensors")
    tensors = {name: tensor.bfloat16() for name, tensor in small.items() if name.startswith("vision_tower.")}
    tensors |= {name: torch.empty(shape, dtype=torch.bfloat16).uniform_() for name, shape in shapes.items()}
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def copy(source: Path, target: Path) -> None:
    """Read and write a file, nothing else."""
    with source.open("rb", buffering=0) as reading, target.open("wb", buffering=0) as writing:
        while block := reading.read(BLOCK_BYTES):
            writing.write(block)


def seconds(action: Callable[[], None], clear: Path) -> float:
    """Least time of several runs; what an action has made is removed in between."""
    times = []
    for _ in range(NUM_RUNS):
        if clear.is_dir():
            shutil.rmtree(clear)
        clear.unlink(missing_ok=True)
        os.sync()
        started_s = time.perf_counter()
        action()
        os.sync()
        times.append(time.perf_counter() - started_s)
    return min(times)


_TIMED = """
import os, sys, time
from megavlm.platform.huge_pages import prefer_huge_pages
prefer_huge_pages()
from megavlm.platform.start import start
start()
import megavlm.checkpoint.convert
from megavlm.cli.main import main
os.sync()
started_s = time.perf_counter()
code = main(sys.argv[1:])
os.sync()
print(time.perf_counter() - started_s)
sys.exit(code)
"""


def convert(*words: object) -> float:
    """Seconds of a conversion in a process of its own, behind its imports."""
    command = [sys.executable, "-c", _TIMED, "convert", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def fastest(clear: Path, *words: object) -> float:
    """Least seconds of several conversions."""
    times = []
    for _ in range(NUM_RUNS):
        shutil.rmtree(clear, ignore_errors=True)
        times.append(convert(*words))
    return min(times)


def main(arguments: list[str] | None = None) -> int:
    """Print the figures; 1 if a required one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0, help="size of the model in 10^9 bytes (default: 4)")
    gigabytes = parser.parse_args(arguments).gb
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        hf_dir = write_large(root / "model", int(gigabytes * 1e9))
        file, native, out = hf_dir / "model.safetensors", root / "native", root / "out"
        plain_s = seconds(lambda: copy(file, root / "copy"), root / "copy")
        import_s = fastest(native, "import", "--hf-dir", hf_dir, "--out", native)
        export_s = fastest(out, "export", "--hf-dir", hf_dir, "--checkpoint", native, "--out", out)
        num_bytes = file.stat().st_size
    reached = True
    rows = []
    for name, took_s in (("import", import_s), ("export", export_s)):
        ratio = plain_s / took_s
        reached = reached and ratio >= LEAST_RATIO
        print(f"{name}: {ratio:.2f} x a plain copy ({num_bytes / took_s / 1e9:.2f} GB/s), at least {LEAST_RATIO}")
        rows.append(
            row(
                f"convert {name}, {gigabytes:g} GB: throughput",
                ratio,
                unit="of a plain read and write of the same bytes",
                required=f">= {LEAST_RATIO} (aim {AIM})",
                reference="plain copy, GB/s",
                reference_value=num_bytes / plain_s / 1e9,
                command=COMMAND,
            )
        )
    record("checkpoint", rows)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
