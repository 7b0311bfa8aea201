"""A limit on how long something that can hang may take."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

from megavlm.errors import RunError


@contextlib.contextmanager
def time_limit(seconds: int, doing: str) -> Iterator[None]:
    """End the process (exit code 1, one line) when the body takes longer: a rank that hangs in a collective, or waits
    for a writer that died, cannot be interrupted in any other way. The launcher then ends the other ranks.
    """

    def give_up() -> None:
        error = RunError(f"{doing} took more than {seconds} s; a writer process or another rank has died")
        sys.stderr.write(f"megavlm: error: {error}\n")
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
