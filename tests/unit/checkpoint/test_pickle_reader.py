"""Weights of torch.save: read when that is allowed, and never run."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.running import call, succeed
from tests.pool import PoolKeeper
from tests.tiny import write_tiny_llava

pytestmark = pytest.mark.next_core


def as_pickle(hf_dir: Path, num_files: int) -> dict[str, torch.Tensor]:
    """Replace a directory's weights by what torch.save makes of them, in one file or several with an index."""
    tensors = load_file(hf_dir / "model.safetensors")
    (hf_dir / "model.safetensors").unlink()
    if num_files == 1:
        torch.save(tensors, hf_dir / "pytorch_model.bin")
        return tensors
    weight_map = {}
    for number in range(num_files):
        name = f"pytorch_model-{number + 1:05d}-of-{num_files:05d}.bin"
        part = {key: tensors[key] for key in list(tensors)[number::num_files]}
        torch.save(part, hf_dir / name)
        weight_map |= dict.fromkeys(part, name)
    (hf_dir / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


@pytest.mark.parametrize("num_files", [1, 3])
def test_import_and_export(workers: PoolKeeper, tmp_path: Path, num_files: int) -> None:
    plain, pickled = write_tiny_llava(tmp_path / "plain"), write_tiny_llava(tmp_path / "pickled")
    as_pickle(pickled, num_files)
    words = ["convert", "import", "--hf-dir", str(pickled), "--out", str(tmp_path / "native")]
    [(code, _, err)] = workers(1).run(call, words=words)
    assert code == 2 and "--allow-pickle" in err
    succeed(workers, 1, [*words, "--allow-pickle"])
    out, _ = succeed(workers, 1, ["convert", "diff", str(plain), str(tmp_path / "native")])
    assert out.startswith("equal")
    words = ["convert", "export", "--hf-dir", str(pickled), "--checkpoint", str(tmp_path / "native")]
    succeed(workers, 1, [*words, "--out", str(tmp_path / "out"), "--allow-pickle"])
    out, _ = succeed(workers, 1, ["convert", "diff", str(plain), str(tmp_path / "out")])
    assert out.startswith("equal")


def bytes_in_parts(path: Path) -> dict[str, bytes]:
    """In a worker: every tensor's bytes, twelve at a time."""
    from megavlm.checkpoint.pickle_reader import PickleFile

    file = PickleFile(path)
    found = {}
    for name in file.names:
        data = bytearray(file.spec(name).num_bytes)
        for start in range(0, len(data), 12):
            file.read_into(name, start, memoryview(data)[start : start + 12])
        found[name] = bytes(data)
    return found


def test_bytes_are_those_of_rows_also_of_a_tensor_that_lies_otherwise(workers: PoolKeeper, tmp_path: Path) -> None:
    whole = torch.arange(35, dtype=torch.float32).reshape(5, 7)
    tensors = {"plain": whole, "turned": whole.T, "part": whole[1:3], "brain": whole.bfloat16().T}
    torch.save(tensors, tmp_path / "file.bin")
    (found,) = workers(1).run(bytes_in_parts, path=tmp_path / "file.bin")
    for name, tensor in tensors.items():
        expected = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert found[name] == expected, name


class Bomb:
    """Makes a folder when it is unpickled by somebody who runs what pickles say."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def bomb(hf_dir: Path) -> None:
    torch.save({"weight": Bomb(str(hf_dir / "harm"))}, hf_dir / "pytorch_model.bin")


def plain_bomb(hf_dir: Path) -> None:
    (hf_dir / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(str(hf_dir / "harm"))))


def cut_short(hf_dir: Path) -> None:
    content = (hf_dir / "pytorch_model.bin").read_bytes()
    (hf_dir / "pytorch_model.bin").write_bytes(content[: len(content) // 2])


def nested(hf_dir: Path) -> None:
    torch.save({"model": {"weight": torch.zeros(2)}}, hf_dir / "pytorch_model.bin")


def whole_numbers(hf_dir: Path) -> None:
    tensors = torch.load(hf_dir / "pytorch_model.bin", weights_only=True)
    torch.save({name: tensor.to(torch.int32) for name, tensor in tensors.items()}, hf_dir / "pytorch_model.bin")


@pytest.mark.parametrize("damage", [bomb, plain_bomb, cut_short, nested, whole_numbers])
def test_anything_else_is_refused(workers: PoolKeeper, tmp_path: Path, damage: Any) -> None:
    hf_dir = write_tiny_llava(tmp_path / "model")
    as_pickle(hf_dir, 1)
    damage(hf_dir)
    words = ["convert", "import", "--hf-dir", str(hf_dir), "--out", str(tmp_path / "native"), "--allow-pickle"]
    [(code, _, err)] = workers(1).run(call, words=words)
    assert code == 2 and "pytorch_model.bin" in err and len(err.strip().splitlines()) == 1, err
    assert not (hf_dir / "harm").exists()
    assert not (tmp_path / "native").exists() or not any((tmp_path / "native").iterdir())
