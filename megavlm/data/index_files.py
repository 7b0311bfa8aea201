"""The index on the disk, made once: by one process or by many together, in parts, each of which is kept.

A folder belongs to one fingerprint: of the rows' files, of what encodes them, of this format. Parts are written under
another name and renamed, so that an interrupted build goes on where it was, also with another number of processes. The
tokens of a part lie in a file of their own, which is there before the part is, and of which only single rows are read.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megavlm import __version__
from megavlm.data.encode import SampleEncoder
from megavlm.data.examine import REASONS, Part, examine
from megavlm.data.index import RowIndex, join
from megavlm.data.sample import Sample
from megavlm.data.token_files import TokenFiles
from megavlm.errors import UseError, use_error

FORMAT = 5
PART_ROWS = 1024
DESCRIPTION = "index.json"
MISTAKES_FILE = "mistakes.txt"
_ARRAYS = (
    "reasons_R",
    "num_tokens_R",
    "cuts_R",
    "num_images_R",
    "digests_R",
    "groups_R",
    "grids_GK",
    "record_bytes_R",
)


@dataclass(frozen=True)
class Builders:
    """The processes that make an index together.

    Attributes:
        number: of this one.
        count: how many there are.
        wait: returns when all have come there.
        agree: what the first of them says, for all; each calls it with what it would say itself.
    """

    number: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None
    agree: Callable[[str], str] = lambda own: own


def fingerprint(files: Iterable[Path], encoder: SampleEncoder, options: str) -> str:
    """What an index depends on, as 16 hexadecimal digits.

    Args:
        files: that hold the rows, or folders of such; names, sizes and times of change count, not what is in them.
        encoder: of the rows; everything that decides about tokens and grids counts.
        options: whatever else decides what is read.
    """
    state = hashlib.sha256(f"{FORMAT} {__version__} {encoder.fingerprint} {options} {REASONS}".encode())
    for path in files:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            found = file.stat()
            state.update(f"{path.name} {file.name} {found.st_size} {found.st_mtime_ns}".encode())
    return state.hexdigest()[:16]


def index_beside(file: Path, name: str) -> Path:
    """Where the index of rows lies by default: in a folder beside the first of their files."""
    return file.absolute().parent / ".megavlm_index" / name


def is_complete(folder: Path) -> bool:
    """Whether an index was made there, to its end."""
    return (folder / DESCRIPTION).is_file()


def build_index(
    folder: Path,
    samples: Sequence[Sample],
    encoder: SampleEncoder,
    *,
    check_images: bool = False,
    stop_at_mistake: bool = False,
    builders: Builders | None = None,
) -> RowIndex:
    """The index that lies in a folder, made or completed where it must be.

    Args:
        folder: of the rows' fingerprint.
        samples: all rows.
        encoder: for the model family.
        check_images: decode every image whole.
        stop_at_mistake: whether a row with a mistake is an error.
        builders: who builds it; each calls this.

    Returns:
        The index, alike for all builders.

    Raises:
        UseError: the folder cannot be written; or, with `stop_at_mistake`, a row's line, the same for all builders.
    """
    builders = builders or Builders()
    starts = range(0, len(samples), PART_ROWS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if builders.number == 0:
            for path in folder.glob("stopped_*"):
                path.unlink()
        builders.wait()
        for start in starts[builders.number :: builders.count]:
            if not _is_made(folder, start) and not make_part(
                folder, samples, encoder, check_images, start, stop_at_mistake=stop_at_mistake
            ):
                break
        builders.wait()
        stopped = sorted(folder.glob("stopped_*"))
        if stopped:
            raise UseError(stopped[0].read_text(encoding="utf-8"))
        parts = [_load_part(_part_path(folder, start), start) for start in starts]
        kept_bytes = [part.record_bytes_R[part.reasons_R == 0] for part in parts]
        tokens = TokenFiles([_tokens_path(folder, start) for start in starts], kept_bytes)
        index = dataclasses.replace(join(parts), tokens=tokens)
        if builders.number == 0:
            _describe(folder, index)
    except OSError as error:
        raise use_error(
            str(folder), str(error), "a folder for the index of the rows, which all ranks share", "set data.index_dir"
        ) from error
    index.check(stop_at_mistake)
    return index


def missing_parts(folder: Path, num_rows: int) -> list[int]:
    """The first rows of the parts that are still to be made."""
    return [start for start in range(0, num_rows, PART_ROWS) if not _is_made(folder, start)]


def make_part(
    folder: Path,
    samples: Sequence[Sample],
    encoder: SampleEncoder,
    check_images: bool,
    start: int,
    *,
    stop_at_mistake: bool = False,
) -> bool:
    """Look at the rows of a part and keep what was found; returns whether it came to the end of them."""
    rows = range(start, min(start + PART_ROWS, len(samples)))
    look = {"check_images": check_images, "stop_at_mistake": stop_at_mistake}
    part = examine(samples, encoder, rows, **look, keep_tokens=True)
    folder.mkdir(parents=True, exist_ok=True)
    if len(part.reasons_R) < len(rows):
        _write_text(folder / f"stopped_{start:012d}", part.messages[-1])
        return False
    _write(_tokens_path(folder, start), lambda file: file.write(part.records))
    _write(_part_path(folder, start), functools.partial(_save_part, part))
    return True


def _part_path(folder: Path, start: int) -> Path:
    return folder / f"part_{start:012d}.npz"


def _is_made(folder: Path, start: int) -> bool:
    return _part_path(folder, start).is_file() and _tokens_path(folder, start).is_file()


def _tokens_path(folder: Path, start: int) -> Path:
    return folder / f"tokens_{start:012d}.bin"


def _write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """A file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            fill(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    _write(path, lambda file: file.write(text.encode()))


def _save_part(part: Part, file: BinaryIO) -> None:
    arrays = {name: vars(part)[name] for name in _ARRAYS}
    np.savez(file, **arrays, messages=np.frombuffer(json.dumps(part.messages).encode(), dtype=np.uint8))


def _load_part(path: Path, start: int) -> Part:
    with np.load(path, allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in _ARRAYS}
        return Part(start, messages=tuple(json.loads(arrays["messages"].tobytes())), **found)


def _describe(folder: Path, index: RowIndex) -> None:
    """What a person wants to know of it; the lines of the rows with mistakes are in a file of their own."""
    facts = {
        "format": FORMAT,
        "rows": index.num_rows,
        "kept": len(index.kept_N),
        "tokens": int(index.num_tokens_N.sum()),
        "images": len(index.grids.grids_GK),
        "cut": {part: len(rows) for part, rows in index.cut.items()},
        "dropped": {reason: len(rows.messages) for reason, rows in index.dropped.items()},
    }
    _write_text(folder / MISTAKES_FILE, "".join(message + "\n" for message in index.mistakes))
    _write_text(folder / DESCRIPTION, json.dumps(facts, indent=1) + "\n")
