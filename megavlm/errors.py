"""The two kinds of failure that a user meets, and how each ends the process.

`UseError` (exit code 2): what was asked for cannot be: a wrong recipe, row, file or layout.
`RunError` (exit code 1): the run itself failed: a NaN loss, a full disk, a dead peer.
Both are printed as one line by `megavlm.cli`; `--debug` shows the traceback.
"""


class UseError(ValueError):
    """A mistake in what the user gave; says what was got, what is expected, and the fix."""


class RunError(RuntimeError):
    """The run could not go on; says where (step, rank, sample ids, path) and why."""


def use_error(where: str, got: object, expected: str, fix: str) -> UseError:
    """Build a `UseError` in the one form that every message has.

    Args:
        where: the key, file or row at fault, e.g. `parallel.tensor_model_parallel_size` or `train.jsonl row 7`.
        got: what was found there.
        expected: what would have been right.
        fix: what the user can do now.
    """
    return UseError(f"{where}: got {got}; expected {expected}; fix: {fix}")
