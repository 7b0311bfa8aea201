"""Environment and fixtures of every test. The environment is set before anything imports torch."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# One thread: several worker processes share the cores, and reductions stay in one order.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Nothing is ever downloaded; a test that tries fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

# Deterministic, and without time limits: machines differ.
settings.register_profile("megavlm", derandomize=True, deadline=None, database=None)
settings.load_profile("megavlm")

from tests.pool import PoolKeeper  # noqa: E402


@pytest.fixture(scope="session")
def workers() -> Iterator[PoolKeeper]:
    """`workers(world_size).run(function, timeout_s=..., **kwargs)` runs a function on every rank of a gloo world."""
    keeper = PoolKeeper()
    yield keeper
    keeper.close()
