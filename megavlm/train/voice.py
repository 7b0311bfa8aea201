"""Of the ranks that fail together, one says why.

A mistake in the rows is found by every rank, a broken image by one; and whichever rank ends first, the others lose
their connection to it. The user is to read the cause, once.
"""

import datetime
import os
import time
from collections.abc import Callable

import torch.distributed as dist

from megavlm.errors import RunError, UseError

GRACE_S = 5.0
"""How long a rank leaves it to others to say what happened."""

JOIN_TIMEOUT_S = 30

_CLAIMED, _SAID, _HEARD = "megavlm/failure/claimed", "megavlm/failure/said", "megavlm/failure/heard"


def lost_peer(error: BaseException) -> bool:
    """Whether an error only says that a collective failed because of another rank, or of the network."""
    cause: BaseException | None = error
    while cause is not None:
        # gloo's errors have no type of their own, but name its source files
        if isinstance(cause, dist.DistError) or (isinstance(cause, RuntimeError) and "gloo/" in str(cause)):
            return True
        cause = cause.__cause__
    return False


def speak_once(error: Exception, say: Callable[[Exception], int]) -> int:
    """Have one rank of the job report an error; all ranks that fail call this, whether they have joined or not.

    Rank 0 goes first; a rank that merely lost its connection goes last, when nobody else has spoken.

    Args:
        error: what this rank has run into.
        say: reports an error and returns the exit code that belongs to it.

    Returns:
        The exit code of what was reported, on every rank.
    """
    store, rank = _meeting_place()
    if lost_peer(error):
        if not isinstance(error, RunError):  # else it says already what this rank waited for
            text = str(error).strip().splitlines()[-1]
            error = RunError(f"lost the connection to another rank; it has died, or the network failed ({text})")
    elif rank == 0:
        code = _say(error, say, store)
        if not dist.is_initialized():
            _wait_for_listeners(store)
        return code
    try:
        said = _said(store)
        code = _say(error, say, store) if said is None else said
        store.add(_HEARD, 1)
        return code
    except dist.DistNetworkError:  # whoever keeps the store has ended, and so has spoken
        return 2 if isinstance(error, UseError) else 1


def _meeting_place() -> tuple[dist.Store, int]:
    """The store that all ranks share, and this rank."""
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store(), dist.get_rank()
    store, rank, _world_size = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=JOIN_TIMEOUT_S)))
    return store, rank


def _say(error: Exception, say: Callable[[Exception], int], store: dist.Store) -> int:
    if store.add(_CLAIMED, 1) > 1:
        return _said(store) or 1
    code = say(error)
    store.set(_SAID, str(code))
    return code


def _wait_for_listeners(store: dist.Store) -> None:
    """Before the job is joined this process may keep the store, and its end would be what the others see.

    They have come upon the same mistake, and listen; should one not have, it is not waited for longer than usual.
    """
    num_others = int(os.environ["WORLD_SIZE"]) - 1
    deadline = time.monotonic() + GRACE_S
    while store.add(_HEARD, 0) < num_others and time.monotonic() < deadline:
        time.sleep(0.05)


def _said(store: dist.Store) -> int | None:
    """The exit code of what another rank says in the time that it is left, or None."""
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline:
        if store.check([_SAID]):  # `wait` would write a warning
            return int(store.get(_SAID))
        time.sleep(0.05)
    return None
