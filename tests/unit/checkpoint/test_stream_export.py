"""Export without tensors: every family's bytes, and of parts of tensors those that lie in order."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.parity.conftest import WRITERS
from tests.pool import PoolKeeper

SMALL_BYTES = 192
"""A buffer of a few rows, so that tiny tensors take many."""


def exported(hf_dir: Path, root: Path, piece_bytes: int, dtype: str | None) -> dict[str, Any]:
    """In a worker: import and export, and compare every tensor with the directory's."""
    from megavlm.checkpoint import stream_export
    from megavlm.checkpoint.convert import DTYPE_NAMES, export_checkpoint, import_checkpoint
    from megavlm.checkpoint.hf_io import HFDirectory

    directory = HFDirectory(hf_dir)
    folder = import_checkpoint(directory, root / "native")
    copied: list[str] = []
    original = stream_export._copy_rows

    def copy(entry: Any, *rest: Any) -> None:
        copied.append(entry.native)
        original(entry, *rest)

    with patch.object(stream_export, "PIECE_BYTES", piece_bytes), patch.object(stream_export, "_copy_rows", copy):
        export_checkpoint(folder, directory, root / "out", dtype)
    out = HFDirectory(root / "out")
    wanted = DTYPE_NAMES[dtype] if dtype else directory.dtype
    different = []
    for entry in directory.entries:
        for name in entry.names:
            expected, found = directory.read(name).to(wanted), out.read(name)
            if found.dtype != expected.dtype or not torch.equal(found, expected):
                different.append(name)
    return {"different": different, "copied": len(copied), "moving": sum(one.moves_rows for one in directory.entries)}


@pytest.mark.parametrize("piece_bytes", [SMALL_BYTES, 2**20])
@pytest.mark.parametrize("family", WRITERS)
def test_every_family_is_exported_bit_for_bit(
    family: str, piece_bytes: int, tmp_path: Path, workers: PoolKeeper
) -> None:
    hf_dir = WRITERS[family](tmp_path / "model", dtype=torch.bfloat16)
    (report,) = workers(1).run(exported, hf_dir=hf_dir, root=tmp_path, piece_bytes=piece_bytes, dtype=None)
    assert report["different"] == []
    assert report["copied"] == report["moving"] > 0


def test_another_type_is_converted(tmp_path: Path, workers: PoolKeeper) -> None:
    hf_dir = WRITERS["llava"](tmp_path / "model", dtype=torch.bfloat16)
    (report,) = workers(1).run(exported, hf_dir=hf_dir, root=tmp_path, piece_bytes=SMALL_BYTES, dtype="float32")
    assert report["different"] == [] and report["copied"] == 0


def saved_in_parts(folder: Path) -> dict[str, Any]:
    """In two workers: tensors that the ranks have parts of; says which can be copied, and whether rows are right."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as distributed_checkpoint
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from megavlm.checkpoint.stream import NativeReader

    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    whole = {name: torch.randn(6, 4, generator=generator) for name in ("rows", "columns", "whole")}
    state = {
        "rows": distribute_tensor(whole["rows"], mesh, [Shard(0)]),
        "columns": distribute_tensor(whole["columns"], mesh, [Shard(1)]),
        "whole": whole["whole"],
    }
    distributed_checkpoint.save(state, checkpoint_id=folder)
    dist.barrier()
    reader = NativeReader(folder)
    found: dict[str, Any] = {}
    for name, tensor in whole.items():
        assert torch.equal(reader.read(name), tensor)
        rows = reader.rows(name)
        if rows is None:
            found[name] = None
            continue
        data = b"".join(
            one.path.read_bytes()[one.offset : one.offset + one.num_rows * tensor.shape[1] * 4] for one in rows
        )
        assert data == tensor.numpy().tobytes(), name
        found[name] = len(rows)
    return found


def test_rows_of_several_ranks_are_found_and_parts_of_rows_are_not(tmp_path: Path, workers: PoolKeeper) -> None:
    assert workers(2).run(saved_in_parts, folder=tmp_path / "parts") == [{"rows": 2, "columns": None, "whole": 1}] * 2


def test_a_tensor_in_another_order_is_not_copied(tmp_path: Path, workers: PoolKeeper) -> None:
    assert workers(1).run(places_of_odd_tensors, folder=tmp_path) == [[None, None, True]]


def places_of_odd_tensors(folder: Path) -> list[Any]:
    """In a worker: whether the bytes of a turned tensor, of a part of a storage, and of a plain one are found."""
    from megavlm.checkpoint.stream import _contiguous_bytes

    plain = torch.arange(12.0).view(3, 4)
    found: list[Any] = []
    for name, tensor in {"turned": plain.T, "part": plain[1:], "plain": plain}.items():
        torch.save(tensor, folder / name)
        with (folder / name).open("rb") as file:
            shape, start = _contiguous_bytes(file)
            assert shape == tuple(tensor.shape)
        if start is None:
            found.append(None)
        else:
            found.append((folder / name).read_bytes()[start : start + tensor.nbytes] == tensor.numpy().tobytes())
    return found
