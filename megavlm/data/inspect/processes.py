"""The same work on many items, in this process or in several: the same results either way, in the items' order."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from megavlm.errors import RunError

Item = TypeVar("Item")
Result = TypeVar("Result")

_CHUNK = 32


def map_items(work: Callable[[Item], Result], items: Sequence[Item], nproc: int = 1) -> Iterator[Result]:
    """Results in the order of the items.

    Args:
        work: a picklable function; what it needs beside an item, it carries (`functools.partial`).
        items: picklable.
        nproc: processes; 1: this one.

    Raises:
        RunError: a process was killed.
    """
    if nproc <= 1 or len(items) <= _CHUNK:
        yield from map(work, items)
        return
    # Spawned, not forked: torch's threads do not survive a fork.
    with ProcessPoolExecutor(nproc, multiprocessing.get_context("spawn"), _set_work, (work,)) as pool:
        try:
            yield from pool.map(_do_work, items, chunksize=_CHUNK)
        except BrokenProcessPool as error:
            raise RunError("a process that looks at the rows was killed (out of memory?); try --nproc 1") from error


_work: list[Callable[[Any], Any]] = []


def _set_work(work: Callable[[Any], Any]) -> None:
    """Once a process, so that a tokenizer does not travel with every item."""
    _work[:] = [work]


def _do_work(item: Any) -> Any:
    return _work[0](item)
