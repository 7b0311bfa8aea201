"""`manifest.json` of a native checkpoint: size and hash of every other file, to find those that are torn or damaged.

The hash is BLAKE3 (O'Connor, Aumasson, Neves, Wilcox-O'Hearn 2020), cryptographic and fast: 4.7 GB/s on a core where
SHA-256, with the processor's own instructions for it, has 1.4. Manifests with SHA-256, which earlier versions wrote,
are checked all the same.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blake3 import blake3

from megavlm.errors import use_error

MANIFEST = "manifest.json"
PIECE_BYTES = 2**20
"""Read, hashed and written at once: small enough to stay in a core's cache on the way."""

_ALGORITHM = "blake3"
_ALGORITHMS: dict[str, Callable[[], Any]] = {"blake3": blake3, "sha256": hashlib.sha256}


class FileHash:
    """Hash of bytes as they come."""

    def __init__(self) -> None:
        self._digest = _ALGORITHMS[_ALGORITHM]()
        self._num_bytes = 0

    def update(self, data: bytes | memoryview) -> None:
        """Take in more."""
        self._digest.update(data)
        self._num_bytes += len(data)

    @property
    def entry(self) -> dict[str, Any]:
        """What the manifest says of a file with these bytes."""
        return {"bytes": self._num_bytes, _ALGORITHM: self._digest.hexdigest()}


def entry_of(path: Path) -> dict[str, Any]:
    """What the manifest says of a file, which is read."""
    return {"bytes": path.stat().st_size, _ALGORITHM: _hash(path, _ALGORITHM)}


def damaged_files(folder: Path) -> list[str]:
    """Names of the files that are not, byte for byte, what a checkpoint's manifest says; reads all of them.

    Args:
        folder: an intact step folder (`native.is_intact`): every file is there with its size.

    Raises:
        UseError: the manifest has a hash that this version does not know.
    """
    manifest: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    damaged = []
    for name, entry in sorted(manifest.items()):
        known = [algorithm for algorithm in _ALGORITHMS if algorithm in entry]
        if not known:
            raise use_error(
                f"{folder / MANIFEST} {name}",
                f"keys {', '.join(sorted(entry))}",
                f"a hash: {' or '.join(_ALGORITHMS)}",
                "check it with the version that wrote it",
            )
        if any(_hash(folder / name, algorithm) != entry[algorithm] for algorithm in known):
            damaged.append(name)
    return damaged


def _hash(path: Path, algorithm: str) -> str:
    digest, buffer = _ALGORITHMS[algorithm](), memoryview(bytearray(PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return str(digest.hexdigest())
