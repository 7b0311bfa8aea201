"""What a failure looks like to the user: one line on stderr, and an exit code."""

import os
import sys

from megavlm.errors import RunError, UseError

HINT = " (--debug shows where)"


def report(error: Exception, hint: str = HINT) -> int:
    """Say an error in one line, and return the exit code that belongs to it.

    Args:
        error: a mistake of the user, a run that failed, or a bug of ours.
        hint: added to the last kind.
    """
    rank = f"rank {os.environ.get('RANK')}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if isinstance(error, UseError):
        say(f"error: {rank}{text}")
        return 2
    if isinstance(error, RunError | OSError):
        say(f"error: {rank}{text or type(error).__name__}")
        return 1
    say(f"internal error: {rank}{type(error).__name__}: {text}{hint}")
    return 1


def say(text: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"megavlm: {text}\n")
    sys.stderr.flush()
