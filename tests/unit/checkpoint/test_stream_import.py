"""Import without tensors: what is written is what torch.save would have written, and a failure leaves nothing."""

import io
import json
import resource
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.running import call, check_intact, succeed
from tests.parity.conftest import WRITERS
from tests.pool import PoolKeeper
from tests.tiny import transpose_experts, write_tiny_llava, write_tiny_qwen3vl_moe

SMALL_BYTES = 192
"""A buffer of a few rows, so that tiny tensors take many."""


def imported(hf_dir: Path, out_dir: Path, piece_bytes: int) -> dict[str, Any]:
    """In a worker: import, and compare every native tensor with what the weight map makes of whole tensors."""
    from megavlm.checkpoint import stream_import
    from megavlm.checkpoint.convert import import_checkpoint
    from megavlm.checkpoint.hf_io import HFDirectory
    from megavlm.checkpoint.stream import NativeReader

    directory = HFDirectory(hf_dir)
    with patch.object(stream_import, "PIECE_BYTES", piece_bytes):
        reader = NativeReader(import_checkpoint(directory, out_dir))
    expected = {entry.native: directory.read_native(entry) for entry in directory.entries}
    assert set(reader.specs) == set(expected)
    different = []
    for name, tensor in expected.items():
        found = reader.read(name)
        if found.dtype != tensor.dtype or not torch.equal(found, tensor):
            different.append(name)
    return {"different": different, "copied": [stream_import._is_copied(directory, one) for one in directory.entries]}


@pytest.mark.parametrize("piece_bytes", [SMALL_BYTES, 2**20])
@pytest.mark.parametrize("family", WRITERS)
def test_every_family_is_imported_bit_for_bit(
    family: str, piece_bytes: int, tmp_path: Path, workers: PoolKeeper
) -> None:
    hf_dir = WRITERS[family](tmp_path / "model", dtype=torch.bfloat16)
    (report,) = workers(1).run(imported, hf_dir=hf_dir, out_dir=tmp_path / "native", piece_bytes=piece_bytes)
    assert report["different"] == []
    assert sum(report["copied"]) > 0.8 * len(report["copied"]), "hardly a tensor was copied row by row"
    check_intact(tmp_path / "native" / "step_00000000")


def test_experts_whose_matrices_are_turned(tmp_path: Path, workers: PoolKeeper) -> None:
    hf_dir = write_tiny_qwen3vl_moe(tmp_path / "model")
    transpose_experts(hf_dir)
    (report,) = workers(1).run(imported, hf_dir=hf_dir, out_dir=tmp_path / "native", piece_bytes=SMALL_BYTES)
    assert report["different"] == [] and not all(report["copied"])


def test_tensors_of_two_types_become_one_of_the_wider(tmp_path: Path, workers: PoolKeeper) -> None:
    hf_dir = write_tiny_llava(tmp_path / "model")
    tensors = load_file(hf_dir / "model.safetensors")
    tensors = {name: one.bfloat16() if "up_proj" in name else one for name, one in tensors.items()}
    save_file(tensors, hf_dir / "model.safetensors", metadata={"format": "pt"})
    (report,) = workers(1).run(imported, hf_dir=hf_dir, out_dir=tmp_path / "native", piece_bytes=2**20)
    assert report["different"] == [] and not all(report["copied"])


def archives(shapes: list[tuple[int, ...]]) -> list[tuple[bytes, bytes]]:
    """In a worker: tensors as torch.save writes them, and as `_archive` and their bytes."""
    from megavlm.checkpoint.stream_import import _archive, _without_crc32

    found = []
    with _without_crc32():
        for shape in shapes:
            tensor = torch.full(shape, 3.0, dtype=torch.bfloat16)
            saved = io.BytesIO()
            torch.save(tensor, saved)
            data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            found.append((saved.getvalue(), data.join(_archive(shape, torch.bfloat16))))
    return found


def test_an_archive_is_byte_for_byte_that_of_torch_save(workers: PoolKeeper) -> None:
    (found,) = workers(1).run(archives, shapes=[(3, 5), (7,), (), (0, 4), (2, 1, 3), (300, 400)])
    for expected, written in found:
        assert written == expected
        torch.load(io.BytesIO(written), weights_only=True)


def on_full_disk(words: list[str], max_file_bytes: int) -> tuple[int, str, str]:
    """In a worker: a command while no file may grow beyond a size, as on a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, before[1]))
    try:
        return call(words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("max_file_bytes", [2_000, 50_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, workers: PoolKeeper, max_file_bytes: int) -> None:
    hf_dir, native = write_tiny_llava(tmp_path / "model"), tmp_path / "native"
    words = ["convert", "import", "--hf-dir", str(hf_dir), "--out", str(native)]
    [(code, _, err)] = workers(1).run(on_full_disk, words=words, max_file_bytes=max_file_bytes)
    assert code == 1 and "is the disk full?" in err and len(err.strip().splitlines()) == 1, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "native"] and not any(native.iterdir())
    succeed(workers, 1, words)
    assert len(json.loads((native / "step_00000000" / "manifest.json").read_text())) > 2
