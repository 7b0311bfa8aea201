"""The certificate of an exported directory, and that it says so when something is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.running import Inputs, call, started, succeed
from tests.pool import PoolKeeper

FAMILIES = ["qwen3_vl", "qwen3_vl_moe", "llava", "qwen2_5_vl", "internvl", "llava_next", "llava_onevision"]


@pytest.fixture
def exported(inputs: Inputs, workers: PoolKeeper, tmp_path: Path) -> tuple[str, Path]:
    """A native checkpoint, and a directory that was exported from it."""
    native, out = str(tmp_path / "native"), tmp_path / "exported"
    hf_dir = str(inputs.model("qwen3_vl"))
    succeed(workers, 1, ["convert", "import", "--hf-dir", hf_dir, "--out", native])
    succeed(workers, 1, ["convert", "export", "--checkpoint", native, "--hf-dir", hf_dir, "--out", str(out)])
    return native, out


def certificate_of(folder: Path) -> dict[str, Any]:
    certificate: dict[str, Any] = json.loads((folder / "conversion.json").read_text())
    return certificate


def test_a_sound_export(exported: tuple[str, Path], tmp_path: Path) -> None:
    native, out = exported
    with started(["convert", "verify", "--hf-dir", str(out), "--checkpoint", native], tmp_path) as run:
        assert run.end() == 0, run.text()
        assert "every one mapped and hashed" in run.text() and "greedy tokens equal" in run.text()
    certificate = certificate_of(out)
    assert certificate["problems"] == [] and certificate["checkpoint"] == {
        "step": "step_00000000",
        "damaged": [],
        "differing": [],
    }
    weights = load_file(out / "model.safetensors")
    assert set(certificate["tensors"]) == set(weights)
    assert len({entry["sha256"] for entry in certificate["tensors"].values()}) == len(weights)
    names = [stage["name"] for stage in certificate["probe"]["stages"]]
    assert names == ["features", "layer 0", "layer 1", "layer 2", "layer 3", "logits"]
    assert all(stage["relative"] < 1e-5 for stage in certificate["probe"]["stages"])
    assert len(certificate["probe"]["greedy_tokens"]["ours"]) > 0
    again = {path.name for path in out.iterdir()}
    assert not any(name.startswith(".") for name in again)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_certificate(inputs: Inputs, workers: PoolKeeper, tmp_path: Path, family: str) -> None:
    folder = tmp_path / family
    folder.mkdir()
    for path in inputs.model(family).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    out, _ = succeed(workers, 1, ["convert", "verify", "--hf-dir", str(folder)])
    assert "greedy tokens equal" in out and certificate_of(folder)["probe"]["first_apart"] == ""


def test_a_composed_model_has_nobody_to_be_compared_with(inputs: Inputs, workers: PoolKeeper, tmp_path: Path) -> None:
    folder = tmp_path / "perceiver"
    folder.mkdir()
    for path in inputs.model("perceiver").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    out, _ = succeed(workers, 1, ["convert", "verify", "--hf-dir", str(folder)])
    assert "nothing to compare" in out and certificate_of(folder)["tensors"]


def test_weights_that_are_not_the_checkpoints(exported: tuple[str, Path], workers: PoolKeeper) -> None:
    native, out = exported
    weights = load_file(out / "model.safetensors")
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    weights[name][0, 0] += 1.0
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    [(code, said, _)] = workers(1).run(call, words=["convert", "verify", "--hf-dir", str(out), "--checkpoint", native])
    assert code == 1 and name in said
    certificate = certificate_of(out)
    assert certificate["checkpoint"]["differing"] == [name] and name in certificate["problems"][0]


def test_a_checkpoint_that_was_damaged(exported: tuple[str, Path], workers: PoolKeeper) -> None:
    native, out = exported
    step = Path(native) / "step_00000000"
    name = max(step.glob("*.distcp"), key=lambda path: path.stat().st_size).name
    content = bytearray((step / name).read_bytes())
    content[-22:] = bytes(22)  # the end of an archive, by which it is found: unreadable
    (step / name).write_bytes(content)
    [(code, said, _)] = workers(1).run(call, words=["convert", "verify", "--hf-dir", str(out), "--checkpoint", native])
    assert code == 1 and f"damaged files in step_00000000, not compared: {name}" in said
    assert certificate_of(out)["checkpoint"] == {"step": step.name, "damaged": [name]}


def test_activations_of_two_models(
    exported: tuple[str, Path], inputs: Inputs, workers: PoolKeeper, tmp_path: Path
) -> None:
    native, out = exported
    words = ["convert", "diff", native, str(out), "--activations"]
    said, _ = succeed(workers, 1, words)
    assert "equal: all" in said and "equal at every layer; the same greedy answer" in said
    weights = load_file(out / "model.safetensors")
    name = "model.language_model.layers.2.mlp.down_proj.weight"
    save_file(weights | {name: weights[name] * 1.5}, out / "model.safetensors", metadata={"format": "pt"})
    [(code, said, _)] = workers(1).run(call, words=words)
    assert code == 1 and "they part at language.decoder.layers.2.mlp.linear_fc2.weight; 1 of" in said
    assert "they part at layer 3" in said
    [(code, _, err)] = workers(1).run(call, words=["convert", "diff", native, native, "--activations"])
    assert code == 2 and "--hf-dir" in err
    hf_dir = str(inputs.model("qwen3_vl"))
    said, _ = succeed(workers, 1, ["convert", "diff", native, native, "--activations", "--hf-dir", hf_dir])
    assert "equal at every layer" in said


def broken_verify(words: list[str]) -> tuple[int, str, str]:
    """In a worker: verify with a mistake in our second decoder layer."""
    from unittest.mock import patch

    from megavlm.checkpoint import hf_load
    from megavlm.train import probe

    def load(directory: Any, parts: Any) -> None:
        hf_load.load_weights(directory, parts)
        with torch.no_grad():
            parts[0].language.decoder.layers[1].mlp.linear_fc2.weight.mul_(1.5)

    with patch.object(probe, "load_weights", load):
        return call(words)


def test_a_model_that_computes_something_else(exported: tuple[str, Path], workers: PoolKeeper) -> None:
    _, out = exported
    [(code, said, _)] = workers(1).run(broken_verify, words=["convert", "verify", "--hf-dir", str(out)])
    assert code == 1 and "the models part at layer 2" in said
    assert certificate_of(out)["probe"]["first_apart"] == "layer 2"


def cut_short(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize("damage", [cut_short, no_weights, broken_config])
def test_a_broken_directory(inputs: Inputs, workers: PoolKeeper, tmp_path: Path, damage: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in inputs.model("qwen3_vl").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    damage(folder)
    [(code, _, err)] = workers(1).run(call, words=["convert", "verify", "--hf-dir", str(folder)])
    assert code == 2 and len([line for line in err.splitlines() if line.startswith("megavlm: ")]) == 1
    assert str(folder) in err and "Traceback" not in err
    assert not (folder / "conversion.json").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["convert", "verify"], ["convert verify", "--hf-dir"]),
        (["convert", "verify", "--hf-dir", "x", "--out", "y"], ["convert verify"]),
        (["convert", "verify", "somewhere"], ["convert verify"]),
        (["convert", "verify", "--hf-dir", "/nowhere"], ["--hf-dir", "/nowhere", "config.json"]),
    ],
)
def test_wrong_words(workers: PoolKeeper, words: list[str], parts: list[str]) -> None:
    [(code, _, err)] = workers(1).run(call, words=words)
    assert code == 2 and all(part in err for part in parts)
