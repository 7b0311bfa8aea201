"""Files of rows, one module for each kind: where rows are, and a row by its position.

Each source has `scan(path)`, which gives (row number, position) of every row without reading rows, and
`read(path, position, where)`, which gives one row as the file has it. A position is two integers.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from megavlm.data.sources.json_array import JsonArrays
from megavlm.data.sources.jsonl import JsonlFiles
from megavlm.data.sources.parquet import ParquetFiles
from megavlm.data.sources.saved_dataset import SavedDatasets, is_saved_dataset
from megavlm.data.sources.tar_shards import TarShards
from megavlm.errors import use_error

__all__ = ["ENDINGS", "Source", "expand_paths", "kind_of", "make_sources"]


class Source(Protocol):
    """Reads rows of files of one kind; opens them when they are needed, and can be pickled."""

    def scan(self, path: str) -> Iterator[tuple[int, tuple[int, int]]]:
        """(row number, position) of every row, in order."""

    def read(self, path: str, position: tuple[int, int], where: str) -> Any:
        """The row at a position, as the file has it; `where` names file and row in errors."""


ENDINGS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".tar": "tar",
}
"""Which source reads a file, by its ending; folders of `save_to_disk` are read by `saved_dataset`."""
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".json.gz", ".jsonl.gz")


def make_sources(max_row_bytes: int) -> dict[str, Source]:
    """The sources, by kind; nothing is open yet."""
    return {
        "json": JsonArrays(max_row_bytes),
        "jsonl": JsonlFiles(max_row_bytes),
        "parquet": ParquetFiles(),
        "saved_dataset": SavedDatasets(),
        "tar": TarShards(max_row_bytes),
    }


def kind_of(path: str) -> str:
    """Which source reads a file or folder.

    Raises:
        UseError: nobody does.
    """
    if os.path.isdir(path):
        return "saved_dataset"
    if path.endswith(_COMPRESSED):
        raise use_error(path, "a compressed file", "an uncompressed one, to read from anywhere", "decompress it")
    kind = ENDINGS.get(os.path.splitext(path)[1])
    if kind is None:
        raise use_error(
            path, "an unknown file type", f"a name that ends in {', '.join(ENDINGS)}", "rename or convert it"
        )
    return kind


def expand_paths(paths: Sequence[str]) -> list[str]:
    """Files of rows behind names, patterns (`shards/*.tar`) and folders, each pattern's and folder's in sorted order.

    A folder stands for the files of rows in it, or, where `save_to_disk` wrote it, for one dataset.

    Raises:
        UseError: a name, pattern or folder behind which there is nothing, or a kind that nobody reads.
    """
    expanded: list[str] = []
    for path in paths:
        if os.path.isfile(path):
            found = [path]
        elif os.path.isdir(path):
            found = [path] if is_saved_dataset(path) else _files_of_rows(path)
        else:
            found = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []
        if not found:
            got = "a folder without files of rows" if os.path.isdir(path) else "no such file"
            raise use_error(
                path,
                got,
                f"files of rows ({', '.join(ENDINGS)}), a pattern, or a folder of them",
                "correct data.train or data.eval",
            )
        expanded.extend(found)
    for path in expanded:
        kind_of(path)
    return expanded


def _files_of_rows(folder: str) -> list[str]:
    names = sorted(name for name in os.listdir(folder) if os.path.splitext(name)[1] in ENDINGS)
    return [os.path.join(folder, name) for name in names]
