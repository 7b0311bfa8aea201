"""Streaming conversion: a file written in pieces, jobs within a budget, memory, and what cannot be converted."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.running import call
from tests.pool import PoolKeeper
from tests.tiny import write_tiny_llava

pytestmark = pytest.mark.next_core

LARGEST_BYTES = 64 * 2**20
NUM_LARGE = 10
"""Tensors of that size in the model whose conversion is measured."""


def write_in_pieces(path: Path) -> dict[str, torch.Tensor]:
    """In a worker: tensors of all types, the last one first."""
    from megavlm.checkpoint.safetensors_writer import SafetensorsWriter, TensorSpec

    generator = torch.Generator().manual_seed(0)
    tensors = {
        "float": torch.randn(3, 5, generator=generator),
        "brain": torch.randn(7, generator=generator).bfloat16(),
        "half": torch.randn(2, 2, 3, generator=generator).half(),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.0),
        "turned": torch.randn(6, 4, generator=generator).T,
    }
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    writer = SafetensorsWriter(path, specs)
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    writer.close()
    return tensors


def test_what_is_written_in_pieces_is_a_safetensors_file(tmp_path: Path, workers: PoolKeeper) -> None:
    (tensors,) = workers(1).run(write_in_pieces, path=tmp_path / "file.safetensors")
    loaded = load_file(tmp_path / "file.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


def most_at_once(sizes: list[int]) -> int:
    """In a worker: bytes in flight at most, while jobs of these sizes run in four threads."""
    from megavlm.checkpoint.stream import run_within_budget

    lock, now, most = threading.Lock(), 0, 0

    def job(size: int) -> None:
        nonlocal now, most
        with lock:
            now += size
            most = max(most, now)
        time.sleep(0.01)
        with lock:
            now -= size

    run_within_budget([(size, lambda size=size: job(size)) for size in sizes], 4)  # type: ignore[misc]
    return most


@pytest.mark.parametrize(("size", "most"), [(2**30, 2**30), (100 * 2**20, 100 * 2**20), (40 * 2**20, 120 * 2**20)])
def test_jobs_stay_within_the_budget(size: int, most: int, workers: PoolKeeper) -> None:
    assert workers(1).run(most_at_once, sizes=[size] * 9)[0] <= most


def first_failure() -> tuple[str, int]:
    """In a worker: what is raised when the third of many jobs fails, and how many had begun."""
    from megavlm.checkpoint.stream import BUDGET_BYTES, run_within_budget

    begun = []

    def job(number: int) -> None:
        begun.append(number)
        if number == 2:
            raise OSError("no space")

    try:
        run_within_budget([(BUDGET_BYTES, lambda number=number: job(number)) for number in range(50)], 2)  # type: ignore[misc]
    except OSError as error:
        return str(error), len(begun)
    return "", len(begun)


def test_the_first_failure_ends_it(workers: PoolKeeper) -> None:
    assert workers(1).run(first_failure)[0] == ("no space", 3)


def _write_large(folder: Path) -> Path:
    """A LLaVA of 0.7 GB in bf16: ten matrices of the largest size."""
    write_tiny_llava(folder, num_layers=2)
    config = json.loads((folder / "config.json").read_text())
    rows = 2**14
    text = config["text_config"]
    text |= {"vocab_size": rows, "hidden_size": LARGEST_BYTES // 2 // rows, "intermediate_size": rows}
    text |= {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 64, "num_hidden_layers": 3}
    config["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    hidden = text["hidden_size"]
    small = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors = {name: tensor for name, tensor in small.items() if name.startswith("vision_tower.")}
    shapes: dict[str, tuple[int, ...]] = {
        "language_model.model.embed_tokens.weight": (rows, hidden),
        "language_model.lm_head.weight": (rows, hidden),
        "language_model.model.norm.weight": (hidden,),
        "multi_modal_projector.linear_1.weight": (hidden, 32),
        "multi_modal_projector.linear_1.bias": (hidden,),
        "multi_modal_projector.linear_2.weight": (hidden, hidden),
        "multi_modal_projector.linear_2.bias": (hidden,),
    }
    for number in range(3):
        layer = f"language_model.model.layers.{number}."
        shapes |= {f"{layer}self_attn.{x}_proj.weight": (hidden, hidden) for x in "qkvo"}
        shapes |= {f"{layer}mlp.{x}_proj.weight": (rows, hidden) for x in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (hidden, rows)}
        shapes |= {f"{layer}{x}_layernorm.weight": (hidden,) for x in ("input", "post_attention")}
    tensors |= {name: torch.empty(shape, dtype=torch.bfloat16).uniform_() for name, shape in shapes.items()}
    assert sum(tensor.nbytes == LARGEST_BYTES for tensor in tensors.values()) >= NUM_LARGE
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


_MEASURED = """
import re, sys
from pathlib import Path
from megavlm.platform.start import start
start()
import megavlm.checkpoint.convert, megavlm.checkpoint.stream
from megavlm.cli.main import main

def kilobytes(key):
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))

Path("/proc/self/clear_refs").write_text("5")  # the peak is that of what follows
before = kilobytes("VmRSS")
code = main(sys.argv[1:])
print(code, 1024 * (kilobytes("VmHWM") - before))
"""


def _peak_bytes(*words: object) -> int:
    """Peak resident memory of a command over that behind its imports, files that are mapped included."""
    command = [sys.executable, "-c", _MEASURED, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    code, peak = done.stdout.split()
    assert code == "0", done.stderr
    return int(peak)


def test_memory_is_little_more_than_the_largest_tensor(tmp_path: Path) -> None:
    hf_dir = _write_large(tmp_path / "model")
    # gate and up projection become one tensor: that is the largest
    most = 2 * 2 * LARGEST_BYTES + 300 * 2**20
    native, out = tmp_path / "native", tmp_path / "out"
    peak_import = _peak_bytes("convert", "import", "--hf-dir", hf_dir, "--out", native)
    peak_export = _peak_bytes("convert", "export", "--hf-dir", hf_dir, "--checkpoint", native, "--out", out)
    model_bytes = (hf_dir / "model.safetensors").stat().st_size
    assert most < model_bytes, "a model that fits into the limit would prove nothing"
    assert max(peak_import, peak_export) <= most, (peak_import / 2**20, peak_export / 2**20)
    before, after = load_file(hf_dir / "model.safetensors"), load_file(out / "model.safetensors")
    # transformers 5 leaves `vision_model.` out; the public directories have it
    before = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in before.items()}
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def _break_header(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[8:20] = b"\0" * 12
    (folder / "model.safetensors").write_bytes(data)


def _index(name: str) -> Any:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "moved.safetensors")
        index = {"metadata": {}, "weight_map": {"language_model.lm_head.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return write


def _other_dtype(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].to(torch.int8)}, folder / "model.safetensors")


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _config_dtype(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float8"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_break_header, "model.safetensors: got unreadable"),
        (_index("../model.safetensors"), "got `../model.safetensors`; expected names of files beside it"),
        (_index("gone.safetensors"), "gone.safetensors: got no such file"),
        (_index("moved.safetensors"), ""),
        (_other_dtype, "got type I8; expected one of F32, BF16, F16"),
        (_pickle, "got weights as pickle (pytorch_model.bin)"),
        (lambda folder: (folder / "model.safetensors").unlink(), "got no weights"),
    ],
)
def test_broken_directories_are_one_line_and_leave_nothing(
    damage: Any, message: str, tmp_path: Path, workers: PoolKeeper
) -> None:
    hf_dir = write_tiny_llava(tmp_path / "model")
    damage(hf_dir)
    words = ["convert", "import", "--hf-dir", str(hf_dir), "--out", str(tmp_path / "native")]
    [(code, _, err)] = workers(1).run(call, words=words)
    assert (code, bool(message)) == (2 if message else 0, code == 2), err
    if message:
        assert message in err and len(err.strip().splitlines()) == 1
        assert not (tmp_path / "native").exists() or not any((tmp_path / "native").iterdir())


def test_an_unknown_type_in_the_config(tmp_path: Path, workers: PoolKeeper) -> None:
    hf_dir, native = write_tiny_llava(tmp_path / "model"), str(tmp_path / "native")
    words = ["--hf-dir", str(hf_dir), "--out"]
    assert workers(1).run(call, words=["convert", "import", *words, native])[0][0] == 0
    _config_dtype(hf_dir)
    words = ["convert", "export", "--checkpoint", native, *words, str(tmp_path / "out")]
    [(code, _, err)] = workers(1).run(call, words=words)
    assert code == 2 and "dtype: got float8; expected one of float32" in err
