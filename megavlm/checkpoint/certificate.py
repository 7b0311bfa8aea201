"""What a directory's weights are, and whether they are a checkpoint's: hashes of all tensors, names, differences.

The certificate `conversion.json` lies beside the weights; `evaluate/probe.py` adds what the model computes.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from megavlm.checkpoint.adapters import open_checkpoint
from megavlm.checkpoint.hf_io import HFDirectory

FILE_NAME = "conversion.json"


def sha256_of(tensor: torch.Tensor) -> str:
    """Of a tensor's bytes, row by row as safetensors stores them."""
    flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(flat).hexdigest()


def tensor_table(directory: HFDirectory) -> dict[str, dict[str, Any]]:
    """Type, shape, hash and native name of every tensor, by its name; every one is mapped.

    Raises:
        UseError: tensors are missing or left over.
    """
    directory.check()
    native = {name: entry.native for entry in directory.entries for name in entry.names}
    table = {}
    for name in directory.names:
        spec = directory.spec(name)
        table[name] = {
            "dtype": str(spec.dtype).removeprefix("torch."),
            "shape": list(spec.shape),
            "sha256": sha256_of(directory.read(name)),
            "native": native.get(name, "a tied weight, not read"),
        }
    return table


def against_checkpoint(directory: HFDirectory, folder: Path) -> list[str]:
    """Names of the directory's tensors that are not, bit for bit, what an export of a checkpoint would write.

    Args:
        directory: exported from the checkpoint.
        folder: the checkpoint's step folder.
    """
    reader = open_checkpoint(folder)
    differing: list[str] = []
    for entry in directory.entries:
        if entry.native not in reader.specs:
            differing += entry.names
            continue
        parts = entry.to_hf(reader.read(entry.native))
        for name, part in zip(entry.names, parts, strict=True):
            stored = directory.read(name)
            if part.shape != stored.shape or not torch.equal(part.to(stored.dtype), stored):
                differing.append(name)
    return differing


def write_certificate(folder: Path, certificate: dict[str, Any]) -> Path:
    """Write it beside the weights, whole or not at all."""
    path, temporary = folder / FILE_NAME, folder / f".{FILE_NAME}"
    temporary.write_text(json.dumps(certificate, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path
