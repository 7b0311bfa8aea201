"""`megavlm convert diff`: equal is equal, and the first tensor that differs is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.running import call
from tests.pool import PoolKeeper
from tests.tiny import write_tiny_qwen3vl

pytestmark = pytest.mark.next_core


def diff(workers: PoolKeeper, *paths: Path) -> tuple[int, str]:
    [(code, out, err)] = workers(1).run(call, words=["convert", "diff", *map(str, paths)])
    return code, out or err


def change(folder: Path, names: list[str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in names:
        tensors[name].view(-1)[0] += 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_directory_and_its_native_form_are_equal(tmp_path: Path, workers: PoolKeeper) -> None:
    hf_dir, native = write_tiny_qwen3vl(tmp_path / "model"), tmp_path / "native"
    words = ["convert", "import", "--hf-dir", str(hf_dir), "--out", str(native)]
    assert workers(1).run(call, words=words)[0][0] == 0
    code, said = diff(workers, hf_dir, native)
    assert code == 0 and said.startswith("equal: all ")


@pytest.mark.parametrize(
    ("names", "first"),
    [
        (["model.language_model.layers.2.mlp.up_proj.weight"], "language.decoder.layers.2.mlp.linear_fc1.weight"),
        (
            ["model.language_model.norm.weight", "model.language_model.layers.3.mlp.down_proj.weight"],
            "language.decoder.layers.3.mlp.linear_fc2.weight",
        ),
        (
            ["model.language_model.embed_tokens.weight", "model.visual.blocks.1.norm2.bias"],
            "vision.block.layers.1.pre_mlp_layernorm.bias",
        ),
        (["model.visual.merger.norm.weight", "model.visual.patch_embed.proj.bias"], "vision.patch_embed.bias"),
    ],
)
def test_the_first_in_running_order_is_named(names: list[str], first: str, tmp_path: Path, workers: PoolKeeper) -> None:
    one, other = write_tiny_qwen3vl(tmp_path / "one"), write_tiny_qwen3vl(tmp_path / "other")
    change(other, names)
    code, said = diff(workers, one, other)
    assert code == 1
    lines = said.splitlines()
    assert lines[0].startswith(f"they part at {first}; {len(names)} of ")
    assert f"  {first}: largest difference 0.5" in said and len(lines) == 1 + len(names)


def test_another_depth(tmp_path: Path, workers: PoolKeeper) -> None:
    one, other = write_tiny_qwen3vl(tmp_path / "one"), write_tiny_qwen3vl(tmp_path / "other", num_layers=5)
    code, said = diff(workers, one, other)
    assert code == 1 and f"only in {other}: language.decoder.layers.4." in said


def test_types_do_not_matter_values_do(tmp_path: Path, workers: PoolKeeper) -> None:
    one = write_tiny_qwen3vl(tmp_path / "one", dtype=torch.bfloat16)
    other = write_tiny_qwen3vl(tmp_path / "other", dtype=torch.bfloat16)
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor.float() for name, tensor in tensors.items()}, other / "model.safetensors")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    assert diff(workers, one, other)[0] == 0


def test_two_are_needed(tmp_path: Path, workers: PoolKeeper) -> None:
    code, said = diff(workers, tmp_path)
    assert code == 2 and "got 1 directories; expected two" in said
