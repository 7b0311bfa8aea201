"""Skips everything where there is no GPU, and writes what was found into `MEGAVLM_GPU_REPORT`, a folder."""

import os
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from megavlm.observe.environment import collect_environment
from megavlm.observe.gpu_report import Check, Figure, GpuReport, Outcome, Throughput, write_gpu_report
from megavlm.platform.capabilities import Capability, probe
from tests.invariant import canon
from tests.parity.conftest import model_dirs, rows_file  # noqa: F401 - fixtures
from tests.pool import PoolKeeper, WorkerPool

GpuWorkers = Callable[[int], WorkerPool]
Figures = Callable[..., None]

_reports = pytest.StashKey[list[pytest.TestReport]]()
_cuda = pytest.StashKey[Capability]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_reports] = []
    config.stash[_cuda] = probe("cuda")


def pytest_runtest_setup(item: pytest.Item) -> None:
    cuda = item.config.stash[_cuda]
    if not cuda.available:
        pytest.skip(f"no GPU: {cuda.detail}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" or report.outcome != "passed":
        item.config.stash[_reports].append(report)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    folder = os.environ.get("MEGAVLM_GPU_REPORT")
    if folder and session.config.stash[_reports]:
        write_gpu_report(make_report(session.config.stash[_reports], session.config.stash[_cuda]), Path(folder))


def make_report(reports: list[pytest.TestReport], cuda: Capability) -> GpuReport:
    """What is written of a session."""
    checks, rows = [], []
    for report in reports:
        measured = [value for name, value in report.user_properties if name == "figure"]
        rows += [Throughput(**value) for name, value in report.user_properties if name == "throughput"]
        module, _, name = report.nodeid.rpartition("/")[2].partition("::")
        section = module.removeprefix("test_").removesuffix(".py")
        outcome: Outcome = report.outcome
        checks.append(Check(section, name, outcome, _reason(report), tuple(Figure(*one) for one in measured)))
    machine = {"GPUs": cuda.detail, "CUDA": cuda.version} if cuda.available else {}
    return GpuReport(
        machine=machine | collect_environment(),
        no_gpu="" if cuda.available else cuda.detail,
        checks=tuple(checks),
        throughput=tuple(rows),
        written=time.strftime("%Y-%m-%d %H:%M"),
    )


def _reason(report: pytest.TestReport) -> str:
    """Why a test was skipped, or the last line of how it failed."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
    return lines[0].removeprefix("E").strip() if lines else report.longreprtext[-200:]


@pytest.fixture(scope="session")
def gpu_workers() -> Iterator[GpuWorkers]:
    """`gpu_workers(num_gpus).run(...)`: as `workers`, on GPUs over NCCL; skips where there are fewer."""
    import torch

    keeper = PoolKeeper()

    def pool(num_gpus: int) -> WorkerPool:
        found = torch.cuda.device_count()
        if found < num_gpus:
            pytest.skip(f"needs {num_gpus} GPUs, this machine has {found}")
        return keeper(num_gpus, device="cuda")

    yield pool
    keeper.close()


@pytest.fixture
def figures(record_property: Callable[[str, object], None]) -> Figures:
    """`figures(values, limits)` reports what a test measured, and fails where a value is above its limit."""

    def check(values: dict[str, float], limits: dict[str, float]) -> None:
        for name, value in values.items():
            record_property("figure", (name, value, limits.get(name)))
        over = {name: value for name, value in values.items() if name in limits and not value <= limits[name]}
        assert not over, f"above the limit: {over} (limits {limits})"

    return check


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the models, images and rows of the canonical run."""
    root = tmp_path_factory.mktemp("gpu")
    canon.write_inputs(root)
    return root


def need(backend: str) -> None:
    """Skip where a backend's package is missing."""
    from megavlm.platform.capabilities import BACKEND_NEEDS

    for name in BACKEND_NEEDS[backend]:
        capability = probe(name)
        if not capability.available:
            pytest.skip(f"{name}: {capability.detail}")
