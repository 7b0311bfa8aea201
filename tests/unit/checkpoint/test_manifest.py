"""Hashes of a checkpoint's files, and what they find."""

import hashlib
import json
from pathlib import Path

import pytest
from blake3 import blake3

from megavlm.checkpoint.manifest import MANIFEST, PIECE_BYTES, FileHash, damaged_files, entry_of
from megavlm.errors import UseError

CONTENT = bytes(range(251)) * (2 * PIECE_BYTES // 251 + 1)
"""Several pieces, the last one not full."""


def write(folder: Path, **entries: object) -> None:
    """Two files, and a manifest that says this of them."""
    for name in entries:
        (folder / name).write_bytes(CONTENT)
    (folder / MANIFEST).write_text(json.dumps(entries))


def test_entries_hold_size_and_hash_however_they_are_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    expected = {"bytes": len(CONTENT), "blake3": blake3(CONTENT).hexdigest()}
    assert entry_of(tmp_path / "file") == expected
    in_parts = FileHash()
    in_parts.update(CONTENT[:100])
    in_parts.update(memoryview(CONTENT)[100:])
    assert in_parts.entry == expected


@pytest.mark.parametrize("algorithm", ["blake3", "sha256"])
def test_a_byte_that_changed_is_found(tmp_path: Path, algorithm: str) -> None:
    digest = {"blake3": blake3, "sha256": hashlib.sha256}[algorithm](CONTENT).hexdigest()
    entry = {"bytes": len(CONTENT), algorithm: digest}
    write(tmp_path, first=entry, second=entry)
    assert damaged_files(tmp_path) == []
    changed = bytearray(CONTENT)
    changed[-1] ^= 1
    (tmp_path / "second").write_bytes(changed)
    assert damaged_files(tmp_path) == ["second"]


def test_a_hash_that_nobody_knows_is_not_taken_for_sound(tmp_path: Path) -> None:
    write(tmp_path, first={"bytes": len(CONTENT), "blake9": "0"})
    with pytest.raises(UseError, match=r"first: got keys blake9, bytes; expected a hash: blake3 or sha256"):
        damaged_files(tmp_path)
