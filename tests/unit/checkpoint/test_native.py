import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

from megavlm.config.schema import Recipe
from tests.invariant import canon
from tests.pool import PoolKeeper, WorkerError, WorkerPool

pytestmark = pytest.mark.next_core

CASES = "tests.unit.checkpoint.native_cases"
# The tiny model's optimizer state does not fit, the small files do.
FULL_DISK_BYTES = 100_000


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("native")
    canon.write_inputs(root)
    return root


@pytest.fixture
def recipe(inputs: Path, tmp_path: Path) -> Recipe:
    return with_changes(inputs, tmp_path)


def with_changes(inputs: Path, tmp_path: Path, family: str = "qwen3_vl", **changes: dict[str, Any]) -> Recipe:
    return dataclasses.replace(canon.recipe(inputs, family, **changes), output_dir=str(tmp_path))


def root_of(recipe: Recipe) -> Path:
    return Path(recipe.run_dir) / "checkpoints"


def names_in(recipe: Recipe) -> list[str]:
    return sorted(path.name for path in root_of(recipe).iterdir())


def largest_file(folder: Path) -> Path:
    return max(folder.rglob("*.distcp"), key=lambda path: path.stat().st_size)


def test_manifest_names_every_file_with_its_size_and_hash(workers: PoolKeeper, recipe: Recipe) -> None:
    ((folder,),) = workers(1).run(f"{CASES}:save_steps", recipe=recipe, steps=[3])
    assert names_in(recipe) == ["latest", "step_00000003"]
    assert (root_of(recipe) / "latest").read_text() == "step_00000003\n"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert set(manifest) == set(files) - {"manifest.json"} and "recipe.yaml" in manifest
    # Every version of Megatron-Core writes these, so that every other one can read them.
    assert {".metadata", "metadata.json", "common.pt", "__0_0.distcp"} <= set(manifest)
    for name, entry in manifest.items():
        content = files[name].read_bytes()
        assert entry == {"bytes": len(content), "blake3": blake3(content).hexdigest()}


def test_newest_checkpoint_is_taken_and_old_ones_are_removed(workers: PoolKeeper, recipe: Recipe) -> None:
    workers(1).run(f"{CASES}:save_steps", recipe=recipe, steps=[1, 2, 10])
    assert names_in(recipe) == ["latest", "step_00000002", "step_00000010"]
    ((folder, step, mark),) = workers(1).run(f"{CASES}:resume_weight", recipe=recipe)
    assert (folder, step, mark) == (root_of(recipe) / "step_00000010", 10, 10.0)


def test_keep_last_zero_keeps_all(workers: PoolKeeper, inputs: Path, tmp_path: Path) -> None:
    keep_all = with_changes(inputs, tmp_path, checkpoint={"keep_last": 0})
    workers(1).run(f"{CASES}:save_steps", recipe=keep_all, steps=[1, 2, 3])
    assert names_in(keep_all) == ["latest", "step_00000001", "step_00000002", "step_00000003"]


def test_multiples_stay(workers: PoolKeeper, inputs: Path, tmp_path: Path) -> None:
    recipe = with_changes(inputs, tmp_path, checkpoint={"keep_last": 1, "keep_every_steps": 4})
    workers(1).run(f"{CASES}:save_steps", recipe=recipe, steps=[2, 4, 6, 8, 9])
    assert names_in(recipe) == ["latest", "step_00000004", "step_00000008", "step_00000009"]


def test_the_same_step_can_be_saved_again(workers: PoolKeeper, recipe: Recipe) -> None:
    workers(1).run(f"{CASES}:save_steps", recipe=recipe, steps=[5])
    workers(1).run(f"{CASES}:save_steps", recipe=recipe, steps=[5])
    assert workers(1).run(f"{CASES}:resume_weight", recipe=recipe)[0][1:] == (5, 5.0)


def test_resume_without_a_checkpoint_starts_anew(workers: PoolKeeper, recipe: Recipe) -> None:
    assert workers(1).run(f"{CASES}:resume_weight", recipe=recipe) == [(None, 0, None)]


@pytest.mark.parametrize("damage", ["truncated", "missing", "manifest missing", "manifest cut off", "manifest empty"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(workers: PoolKeeper, recipe: Recipe, damage: str) -> None:
    ((_, newest),) = workers(1).run(f"{CASES}:save_steps", recipe=recipe, steps=[1, 2])
    file = largest_file(newest)
    manifest = newest / "manifest.json"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing":
        file.unlink()
    elif damage == "manifest missing":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:40] if damage == "manifest cut off" else "")
    ((folder, step, mark),) = workers(1).run(f"{CASES}:resume_weight", recipe=recipe)
    assert (folder, step, mark) == (root_of(recipe) / "step_00000001", 1, 1.0)


def test_load_dir_without_a_checkpoint_is_an_error(workers: PoolKeeper, inputs: Path, tmp_path: Path) -> None:
    asking = with_changes(inputs, tmp_path, checkpoint={"load_dir": str(tmp_path)})
    (message,) = workers(1).run(f"{CASES}:resume_error", recipe=asking)
    assert str(tmp_path) in message and "no complete checkpoint" in message and "\n" not in message


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("family", ["internvl", "internvl_6b"])
def test_an_encoder_is_the_same_in_another_tensor_parallel_size(
    workers: PoolKeeper, inputs: Path, tmp_path: Path, family: str, before: int, after: int
) -> None:
    def run(size: int, case: str) -> list[dict[str, Any]]:
        parallel = {"tensor_model_parallel_size": size, "use_distributed_optimizer": False}
        return workers(size).run(f"{CASES}:{case}", recipe=with_changes(inputs, tmp_path, family, parallel=parallel))

    saved, resumed = run(before, "save_trained"), run(after, "resume_held")
    cut_names = {name for name, (*_, cut) in saved[0].items() if cut is not None}
    assert any(name.endswith("self_attention.q_layernorm.weight") for name in cut_names) == (family == "internvl_6b")
    assert saved[0].keys() == resumed[0].keys()
    for name, (*_, cut) in saved[0].items():
        for place in range(2):  # the parameter, its moment
            parts = [[rank[name][place] for rank in ranks] for ranks in (saved, resumed)]
            first, second = (ranks[0] if cut is None else torch.cat(ranks, cut) for ranks in parts)
            assert torch.equal(first, second), name
        assert saved[0][name][1].any(), name


def test_load_dir_takes_a_step_folder(workers: PoolKeeper, recipe: Recipe, inputs: Path, tmp_path: Path) -> None:
    ((first, _),) = workers(1).run(f"{CASES}:save_steps", recipe=recipe, steps=[1, 2])
    other = with_changes(inputs, tmp_path / "other", checkpoint={"load_dir": str(first)})
    assert workers(1).run(f"{CASES}:resume_weight", recipe=other)[0] == (first, 1, 1.0)


@pytest.mark.parametrize(
    ("family", "changes", "wanted"),
    [
        ("llava", {}, ("another model (qwen3_vl)", "llava")),
        ("qwen3_vl", {"train": {"seed": 4321}}, ("train.seed: got 4321; expected 1234",)),
        ("qwen3_vl", {"parallel": {"use_distributed_optimizer": False}}, ("parallel.use_distributed_optimizer",)),
        ("qwen3_vl", {"train": {"global_batch_size": 4}}, ("train.global_batch_size: got 4", "8 samples by then")),
        ("qwen3_vl", {"optimizer": {"freeze_vit": True}}, ("optimizer.freeze_*", "vision")),
        ("other sizes", {}, ("another model (other sizes)",)),
    ],
    ids=["family", "seed", "optimizer", "batch", "frozen", "sizes"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    workers: PoolKeeper,
    inputs: Path,
    tmp_path: Path,
    recipe: Recipe,
    family: str,
    changes: dict[str, dict[str, Any]],
    wanted: tuple[str, ...],
) -> None:
    if family == "other sizes":
        from tests.tiny import write_tiny_qwen3vl

        write_tiny_qwen3vl(inputs / family, num_layers=3)
    workers(1).run(f"{CASES}:save_steps", recipe=recipe, steps=[1])
    (message,) = workers(1).run(f"{CASES}:resume_error", recipe=with_changes(inputs, tmp_path, family, **changes))
    for part in (*wanted, "; fix: "):
        assert part in message, message
    assert "\n" not in message


def test_content_that_cannot_be_read_is_one_line(workers: PoolKeeper, recipe: Recipe) -> None:
    ((folder,),) = workers(1).run(f"{CASES}:save_steps", recipe=recipe, steps=[1])
    file = largest_file(folder)
    file.write_bytes(bytes(file.stat().st_size))  # as long as before
    (message,) = workers(1).run(f"{CASES}:load_error", recipe=recipe)
    assert message.startswith(f"cannot load {folder}: ") and "\n" not in message


def test_a_killed_save_leaves_the_last_good_checkpoint(workers: PoolKeeper, recipe: Recipe) -> None:
    workers(1).run(f"{CASES}:save_steps", recipe=recipe, steps=[1])
    pool = WorkerPool(1)
    try:
        with pytest.raises(WorkerError, match="exit code -9"):
            pool.run(f"{CASES}:save_killed", recipe=recipe, step=2)
    finally:
        pool.close()
    assert ".writing_step_00000002" in names_in(recipe)
    assert workers(1).run(f"{CASES}:resume_weight", recipe=recipe)[0][1:] == (1, 1.0)
    workers(1).run(f"{CASES}:save_steps", recipe=recipe, steps=[2])
    assert names_in(recipe) == ["latest", "step_00000001", "step_00000002"]
    assert workers(1).run(f"{CASES}:resume_weight", recipe=recipe)[0][1:] == (2, 2.0)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_full_disk_leaves_the_last_good_checkpoint(
    workers: PoolKeeper, inputs: Path, tmp_path: Path, world_size: int
) -> None:
    recipe = with_changes(inputs, tmp_path, parallel={"tensor_model_parallel_size": world_size})
    workers(world_size).run(f"{CASES}:save_steps", recipe=recipe, steps=[1])
    messages = workers(world_size).run(
        f"{CASES}:save_on_full_disk", recipe=recipe, step=2, max_file_bytes=FULL_DISK_BYTES
    )
    for message in messages:
        assert message.startswith(f"step 2: cannot save {root_of(recipe) / 'step_00000002'} ("), message
        assert message.endswith("is the disk full?") and "\n" not in message, message
    assert names_in(recipe) == ["latest", "step_00000001"]
    assert {result[1:] for result in workers(world_size).run(f"{CASES}:resume_weight", recipe=recipe)} == {(1, 1.0)}


def test_training_goes_on_after_a_failed_save(workers: PoolKeeper, recipe: Recipe) -> None:
    (folder,) = workers(1).run(f"{CASES}:save_again_after_error", recipe=recipe, step=1, max_file_bytes=FULL_DISK_BYTES)
    assert folder.name == "step_00000002" and names_in(recipe) == ["latest", "step_00000002"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_goes_on_while_a_copy_is_written(
    workers: PoolKeeper, inputs: Path, tmp_path: Path, world_size: int
) -> None:
    recipe = with_changes(inputs, tmp_path, parallel={"tensor_model_parallel_size": world_size})
    results = workers(world_size).run(f"{CASES}:save_while_training", recipe=recipe, step=3)
    assert results == [(False, 3.0, 77.0)] * world_size
    assert names_in(recipe) == ["latest", "step_00000003"]


def test_the_optimizer_is_saved_as_it_was(workers: PoolKeeper, recipe: Recipe) -> None:
    ((before, later),) = workers(1).run(f"{CASES}:moments_of_a_save_while_training", recipe=recipe)
    assert before == 0 and later > 0


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_disk_that_fills_up_while_training_goes_on(
    workers: PoolKeeper, inputs: Path, tmp_path: Path, world_size: int
) -> None:
    recipe = with_changes(inputs, tmp_path, parallel={"tensor_model_parallel_size": world_size})
    messages = workers(world_size).run(
        f"{CASES}:begun_on_full_disk", recipe=recipe, step=2, max_file_bytes=FULL_DISK_BYTES
    )
    assert all(message.startswith("step 2: cannot save") and "\n" not in message for message in messages), messages
    assert names_in(recipe) == []


def test_the_best_stay(workers: PoolKeeper, inputs: Path, tmp_path: Path) -> None:
    recipe = with_changes(inputs, tmp_path, checkpoint={"keep_last": 1, "keep_best": 2})
    losses = {1: 3.0, 2: 1.5, 3: 2.0, 4: float("nan"), 5: 4.0, 6: 3.5}
    workers(1).run(f"{CASES}:save_evaluated", recipe=recipe, losses=losses)
    assert names_in(recipe) == ["latest", "step_00000002", "step_00000003", "step_00000006"]
    assert json.loads((root_of(recipe) / "step_00000002" / "evaluation.json").read_text()) == {"loss": 1.5}
