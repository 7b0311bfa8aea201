"""How a case runs over a stand-in. Imports megatron only when it runs."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch

from megavlm.config import backends
from tests.stand_ins import calls, flash


@contextlib.contextmanager
def counted_in_fp32() -> Iterator[dict[str, int]]:
    """Have attention go to the stand-ins in fp32 too, which real kernels refuse; gives the numbers of calls.

    flash-attn's is there as well; Transformer Engine's must be there from a worker's start (`tests/pool.py`).
    """
    from megavlm.models import kernels

    calls.seen.clear()
    with (
        flash.installed(),
        patch.object(kernels, "HALF_PRECISIONS", (*kernels.HALF_PRECISIONS, torch.float32)),
        patch.object(backends, "_check_precision", lambda _recipe: None),
    ):
        yield calls.seen


def run(name: str, **arguments: Any) -> tuple[Any, dict[str, int]]:
    """Run a `module:function` so; its result, and the calls by name."""
    module, _, function = name.partition(":")
    with counted_in_fp32() as counts:
        result = vars(importlib.import_module(module))[function](**arguments)
    return result, dict(counts)
