import json
from dataclasses import replace

import pytest

from megavlm.cli import doctor
from megavlm.cli.main import main
from megavlm.platform import capabilities
from megavlm.platform.capabilities import Capability


def machine_with(*available: str) -> tuple[Capability, ...]:
    return tuple(
        Capability(name, name in available, "1.2" if name in available else "", "found [x]", f"get {name}", "work")
        for name in capabilities.PROBES
    )


CPU = ("torch", "gloo", "megatron-core", "transformers", "psutil")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Capability]:
    """What the probes report; the tests change it."""
    reported = list(machine_with(*CPU))

    def probe_all() -> tuple[Capability, ...]:
        print("a package greets on import")
        return tuple(reported)

    monkeypatch.setattr(capabilities, "probe_all", probe_all)
    return reported


@pytest.mark.parametrize(
    ("available", "platform", "obstacles"),
    [
        (CPU, "cpu", ()),
        ((*CPU, "cuda", "nccl"), "cuda", ()),
        ((*CPU, "cuda"), "cuda", ("nccl",)),
        (("torch", "megatron-core", "transformers"), "cpu", ("psutil", "gloo")),
        ((), "cpu", ("torch", "megatron-core", "transformers", "psutil", "gloo")),
    ],
)
def test_platform_and_obstacles(available: tuple[str, ...], platform: str, obstacles: tuple[str, ...]) -> None:
    found = machine_with(*available)
    assert doctor.chosen_platform(found) == platform
    assert doctor.training_obstacles(found) == obstacles


def test_json_is_pure_and_complete(found: list[Capability], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert "greets" in captured.err
    assert (report["platform"], report["can_train"], report["missing"]) == ("cpu", True, [])
    assert [row["name"] for row in report["capabilities"]] == list(capabilities.PROBES)
    assert report["capabilities"][0]["version"] == "1.2"
    assert report["machine"]["cpu_cores"] >= 1
    assert report["machine"]["memory_bytes"] > 2**20


def test_exit_code_1_when_something_required_is_missing(
    found: list[Capability], capsys: pytest.CaptureFixture[str]
) -> None:
    at = list(capabilities.PROBES).index("megatron-core")
    found[at] = replace(found[at], available=False, install='pip install "megatron-core>=0.16.1,<0.20"')
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert 'megatron-core: pip install "megatron-core>=0.16.1,<0.20"' in shown
    assert "Training is not possible here: megatron-core missing." in shown
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["missing"] == ["megatron-core"]


def test_tables_name_everything(found: list[Capability], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for name in capabilities.PROBES:
        assert name in shown
    for word in ("CPU cores", "memory", "free disk here", "shared memory", "open files", "found [x]"):
        assert word in shown
    assert "get vllm" in shown and "get torch" not in shown
    assert "Training is possible here, on the platform `cpu`." in shown


def test_small_shared_memory_is_pointed_out(
    found: list[Capability], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(doctor.inspect_machine(), shared_memory_bytes=64 * 2**20, max_locked_memory_bytes=None)
    monkeypatch.setattr(doctor, "inspect_machine", lambda: small)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "64.0 MiB" in shown and "--ipc=host" in shown and "no limit" in shown


def test_this_machine_can_train(capsys: pytest.CaptureFixture[str]) -> None:
    """The real probes: wherever the tests run, the required packages are installed."""
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in report["capabilities"]}
    assert rows["torch"]["available"] and rows["torch"]["version"]
    assert rows["gloo"]["available"] or rows["nccl"]["available"]
    assert report["platform"] == ("cuda" if rows["cuda"]["available"] else "cpu")
