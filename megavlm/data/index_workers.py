"""The parts of an index made by worker processes of this one: for the command, which has no ranks."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from megavlm.data.encode import SampleEncoder
from megavlm.data.index import RowIndex
from megavlm.data.index_files import build_index, make_part, missing_parts
from megavlm.data.sample import Sample

_given: list[tuple[Path, Sequence[Sample], SampleEncoder, bool]] = []
"""What a worker process was started with."""


def build_index_with_processes(
    folder: Path,
    samples: Sequence[Sample],
    encoder: SampleEncoder,
    *,
    check_images: bool,
    num_processes: int,
    progress: Callable[[int, int], None],
) -> RowIndex:
    """As `index_files.build_index`, by several processes; rows with mistakes are left out and counted.

    Args:
        folder: of the rows' fingerprint.
        samples: all rows.
        encoder: for the model family.
        check_images: decode every image whole.
        num_processes: that work; this one only waits for them, unless it is one alone.
        progress: called with the parts that are done and those that there are to do.
    """
    missing = missing_parts(folder, len(samples))
    progress(0, len(missing))
    given = (folder, samples, encoder, check_images)
    if num_processes == 1:
        for done, start in enumerate(missing, 1):
            make_part(*given, start)
            progress(done, len(missing))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_processes, context, initializer=_begin, initargs=given) as pool:
            futures = [pool.submit(_make, start) for start in missing]
            try:
                for done, future in enumerate(as_completed(futures), 1):
                    future.result()
                    progress(done, len(missing))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return build_index(folder, samples, encoder, check_images=check_images)


def _begin(folder: Path, samples: Sequence[Sample], encoder: SampleEncoder, check_images: bool) -> None:
    torch.set_num_threads(1)  # the processes share the cores among them
    _given.append((folder, samples, encoder, check_images))


def _make(start: int) -> None:
    make_part(*_given[0], start)
