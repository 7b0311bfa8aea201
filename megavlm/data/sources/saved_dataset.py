"""Folders written by `save_to_disk` of Hugging Face datasets: memory-mapped Arrow streams, listed in state.json.

A position is (record batch, row in it); record batches are counted over all files of the folder.
The layout of the folder: datasets/arrow_dataset.py, `Dataset.save_to_disk` (huggingface/datasets@4.0).
"""

import json
import os
from collections.abc import Iterator
from typing import Any

from megavlm.data.sources.handles import Handles
from megavlm.data.sources.parquet import row_of
from megavlm.errors import UseError, use_error

STATE_NAME = "state.json"
SPLITS_NAME = "dataset_dict.json"


class SavedDatasets:
    """Reads rows of saved datasets; pages come into memory as rows are read."""

    def __init__(self) -> None:
        self._folders: Handles[list[Any]] = Handles(_open_batches, max_open=4)

    def scan(self, path: str) -> Iterator[tuple[int, tuple[int, int]]]:
        """(row number, position) of each row.

        Raises:
            UseError: no saved dataset, or one of several splits.
        """
        row_number = 0
        for batch_number, batch in enumerate(self._folders.get(path)):
            for row in range(batch.num_rows):
                row_number += 1
                yield row_number, (batch_number, row)

    def read(self, path: str, position: tuple[int, int], where: str) -> Any:
        """The row at a position, without its empty columns.

        Raises:
            UseError: the folder is no saved dataset any more.
        """
        batch_number, row = position
        return row_of(self._folders.get(path)[batch_number], row, where)


def is_saved_dataset(folder: str) -> bool:
    """Whether `save_to_disk` wrote it, with or without splits."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in (STATE_NAME, SPLITS_NAME))


def _open_batches(folder: str) -> list[Any]:
    """Its record batches, memory-mapped."""
    # Here, not at the top: who reads no tables is spared the import.
    import pyarrow as pa

    if not os.path.isfile(os.path.join(folder, STATE_NAME)):
        raise use_error(
            folder,
            "a saved dataset of several splits",
            "one split",
            "name the folder of one split, e.g. " + os.path.join(folder, "train"),
        )
    batches: list[Any] = []
    for name in _data_files(folder):
        file = os.path.join(folder, name)
        try:
            with pa.ipc.open_stream(pa.memory_map(file)) as stream:
                batches.extend(stream)
        except (pa.ArrowException, OSError) as error:
            raise _broken(file, error) from error
    return batches


def _data_files(folder: str) -> list[str]:
    path = os.path.join(folder, STATE_NAME)
    try:
        with open(path, encoding="utf-8") as file:
            names = [entry["filename"] for entry in json.load(file)["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(path, error) from error
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise use_error(path, f"the file name {name!r}", "names of files in this folder", "save the dataset again")
    return names


def _broken(where: str, error: Exception) -> UseError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return use_error(where, f"unreadable saved dataset ({reason})", "what save_to_disk wrote", "save it again")
