"""`megavlm plan` on a worker: what it prints and writes, and what it refuses."""

import json
from pathlib import Path

import pytest
import yaml

from tests.distributed.running import call, the_error
from tests.parity.composed import COMPOSED, ComposedReference
from tests.pool import PoolKeeper


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import write_tiny_qwen3vl

    root = tmp_path_factory.mktemp("plan")
    write_tiny_qwen3vl(root / "model")
    (root / "model" / "model.safetensors").unlink()  # config.json is enough
    (root / "lengths.csv").write_text("num_tokens,grids\n" + "40,1x4x6\n30,\n64,1x8x8 1x4x4\n" * 10)
    recipe = {
        "model": {"hf_dir": str(root / "model")},
        "data": {"train": ["rows.jsonl"], "max_length": 128},
        "train": {"train_iters": 1, "global_batch_size": 8},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def words_of(root: Path, *more: str) -> list[str]:
    return ["plan", str(root / "recipe.yaml"), "--gpus", "4", "--lengths", str(root / "lengths.csv"), *more]


def test_prints_the_best_and_writes_the_block(root: Path, workers: PoolKeeper, tmp_path: Path) -> None:
    out_file = tmp_path / "layout.yaml"
    ((code, out, err),) = workers(1).run(call, words=words_of(root, "--write", str(out_file)))
    assert code == 0, err
    assert "1. " in out and "5. " in out and "Nothing here was measured on a GPU" in out
    tree = yaml.safe_load(out_file.read_text())
    assert set(tree) <= {"parallel", "train", "data"} and "parallel" in tree
    assert out.endswith(out_file.read_text())


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--hardware", "h1000"], ["--hardware", "h100"]),
        (["--memory-gb", "0.00001"], ["--memory-gb", "at least"]),
        (["--gpus", "0"], ["--gpus: got 0"]),
        (["data.max_length=8"], ["data.max_length: got 8"]),
    ],
)
def test_refusals_are_one_line(root: Path, workers: PoolKeeper, more: list[str], parts: list[str]) -> None:
    ((code, _, err),) = workers(1).run(call, words=words_of(root, *more))
    assert code == 2
    the_error(err, *parts)


def test_a_hardware_file(root: Path, workers: PoolKeeper, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps({"base": "h100", "name": "mine", "source": "me", "compute_efficiency": 0.4}))
    ((code, out, err),) = workers(1).run(call, words=words_of(root, "--hardware", str(file)))
    assert code == 0 and "mine" in out and "40%" in out, err


def known_families() -> tuple[set[str], set[str]]:
    """Run on a worker: families of the registry, and those of the planner."""
    from megavlm.models.registry import FAMILIES
    from megavlm.planner.families import TOWERS

    return set(FAMILIES), set(TOWERS)


def test_the_planner_knows_every_family(workers: PoolKeeper) -> None:
    ((registered, planned),) = workers(1).run(known_families)
    assert registered == planned


@pytest.mark.parametrize("kind", COMPOSED)
def test_composed_models(kind: str, root: Path, workers: PoolKeeper, tmp_path: Path) -> None:
    hf_dir = ComposedReference(kind).write(tmp_path / "composed")
    ((code, out, err),) = workers(1).run(call, words=words_of(root, f"model.hf_dir={hf_dir}"))
    assert code == 0, err
    assert "1. " in out
