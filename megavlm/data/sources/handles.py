"""Open files, a few at a time: a reader of many files keeps those it used last.

What is open stays in its process: a pickled or forked copy opens its own, since file positions and locks are not to be
shared.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Handle = TypeVar("Handle")


class RandomAccessFile:
    """A file that is read from anywhere, by several threads if need be; closed when nobody uses it any more."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # Kept here: when the interpreter ends, the module may be gone before this is.
        self._close = os.close

    def read(self, offset: int, num_bytes: int) -> bytes:
        """So many bytes, or fewer where the file ends."""
        return os.pread(self._descriptor, num_bytes, offset)

    def __del__(self) -> None:
        if "_descriptor" in vars(self):
            self._close(self._descriptor)


class Handles(Generic[Handle]):
    """What `open_one(path)` gives, for the files that were asked for last.

    `lock` is for handles that have a position, and are not to be used by two threads at once.
    """

    def __init__(self, open_one: Callable[[str], Handle], max_open: int = 8) -> None:
        """Nothing is opened yet.

        Args:
            open_one: a function at the top of its module, so that it can be pickled.
            max_open: handles that are kept; of the others nothing is left but what still uses them.
        """
        self._open_one = open_one
        self._max_open = max_open
        self._forget()

    def _forget(self) -> None:
        self._open: OrderedDict[str, Handle] = OrderedDict()
        self._process = os.getpid()
        self._lock = threading.RLock()

    @property
    def lock(self) -> threading.RLock:
        """Of this process."""
        if self._process != os.getpid():  # forked: the parent's threads may hold its lock
            self._forget()
        return self._lock

    def get(self, path: str) -> Handle:
        """The open file."""
        with self.lock:
            if path in self._open:
                self._open.move_to_end(path)
            else:
                self._open[path] = self._open_one(path)
                if len(self._open) > self._max_open:
                    self._open.popitem(last=False)
            return self._open[path]

    def __getstate__(self) -> dict[str, Any]:
        return {"open_one": self._open_one, "max_open": self._max_open}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._open_one, self._max_open = state["open_one"], state["max_open"]
        self._forget()
