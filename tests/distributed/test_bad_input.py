"""Every mistake is one line with file and row or key, an exit code, an end of all processes, and no harm to what was
saved before.

Mistakes in the recipe are found before torch is imported, and cost a process each. What takes a model to find runs
in the pool's workers, unless processes and their end are the subject.
"""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.running import (
    GONE_WITHIN_S,
    Inputs,
    call,
    check_intact,
    checkpoints,
    log_rows,
    losses,
    started,
    succeed,
    the_error,
)
from tests.pool import PoolKeeper, WorkerError

Rows = list[dict[str, Any]]


@pytest.mark.parametrize("launch", [[], ["--nproc", "2"]])
@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.hf_dir=/nowhere/model"], ["model.hf_dir", "`/nowhere/model`"]),
        (["data.train=/nowhere/rows.jsonl"], ["data.train[0]", "`/nowhere/rows.jsonl`"]),
        (["train.train_iters=many"], ["train.train_iters", "many"]),
        (["parallel.tensor_parallel=2"], ["parallel.tensor_parallel", "unknown key", "tensor_model_parallel_size"]),
        (["parallel.pipeline_model_parallel_size=4"], ["world size", "a multiple of 4"]),
    ],
)
def test_mistakes_on_the_command_line(
    inputs: Inputs, tmp_path: Path, overrides: list[str], parts: list[str], launch: list[str]
) -> None:
    with started([*inputs.train(tmp_path, *overrides), *launch], tmp_path) as run:
        assert run.end() == 2
        the_error(run.text(), *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("section", "knobs", "part"),
    [
        ("train", {"train_iters": "many"}, "train.train_iters: got 'many' (text)"),
        ("train", {"train_iter": 3}, "train.train_iter: got an unknown key"),
        ("data", 7, "data"),
    ],
)
def test_mistakes_in_the_recipe_name_its_file(
    inputs: Inputs, tmp_path: Path, section: str, knobs: Any, part: str
) -> None:
    recipe = yaml.safe_load(Path(inputs.recipe).read_text())
    recipe[section] = recipe[section] | knobs if isinstance(knobs, dict) else knobs
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(recipe))
    with started(["train", str(tmp_path / "wrong.yaml")], tmp_path) as run:
        assert run.end() == 2
        the_error(run.text(), str(tmp_path / "wrong.yaml"), part)


def test_no_recipe_and_heads_that_do_not_divide(inputs: Inputs, tmp_path: Path) -> None:
    with started(["train", "/nowhere/recipe.yaml"], tmp_path) as run:
        assert run.end() == 2
        the_error(run.text(), "/nowhere/recipe.yaml", "no such file")
    words = inputs.train(tmp_path, "parallel.tensor_model_parallel_size=3", "train.global_batch_size=3")
    with started([*words, "--nproc", "3"], tmp_path) as run:
        assert run.end() == 2
        the_error(run.text(), "tensor_model_parallel_size", "got 3", "heads")


def test_nproc_under_torchrun(inputs: Inputs, tmp_path: Path) -> None:
    words = [*inputs.train(tmp_path), "--nproc", "2"]
    with started(words, tmp_path, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0") as run:
        assert run.end() == 2
        the_error(run.text(), "--nproc", "torchrun")


def one_image_too_few(rows: Rows, folder: Path) -> None:
    rows[2]["images"] = []


def no_answer(rows: Rows, folder: Path) -> None:
    rows[3]["messages"].pop()


def empty_file_for_an_image(rows: Rows, folder: Path) -> None:
    (folder / "empty.png").touch()
    rows[4]["images"] = [str(folder / "empty.png")]


def text_for_an_image(rows: Rows, folder: Path) -> None:
    (folder / "text.png").write_text("not an image")
    rows[6]["images"] = [str(folder / "text.png")]


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (one_image_too_few, ["rows.jsonl row 3", "0 images and 1 <image>"]),
        (no_answer, ["rows.jsonl row 4", "no answer"]),
        (empty_file_for_an_image, ["rows.jsonl:5", "empty.png", "unreadable image"]),
        (text_for_an_image, ["rows.jsonl:7", "text.png", "unreadable image"]),
    ],
)
def test_rows_that_every_rank_refuses(
    inputs: Inputs, workers: PoolKeeper, tmp_path: Path, damage: Callable[[Rows, Path], None], parts: list[str]
) -> None:
    check_refused_by_all(workers, inputs.train(tmp_path, inputs.damaged(tmp_path / "damaged", damage)), *parts)
    assert checkpoints(tmp_path) == []


def check_refused_by_all(workers: PoolKeeper, words: list[str], *parts: str, only: bool = True) -> None:
    """Rank 0 says it, the other is silent, both end with 2."""
    (code, _, err), (other_code, _, other_err) = workers(2).run(call, words=words)
    assert code == other_code == 2
    assert other_err == ""
    the_error(err, *parts, only=only)


def all_of_them(rows: Rows, folder: Path) -> None:
    for damage in (one_image_too_few, no_answer, empty_file_for_an_image, text_for_an_image):
        damage(rows, folder)
    whole = Path(rows[8]["images"][0]).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])  # its header is whole: found when it is decoded
    rows[8]["images"] = [str(folder / "cut.png")]


@pytest.mark.parametrize(
    "layout", [[], ["parallel.pipeline_model_parallel_size=2", "parallel.vision_placement=bubble"]]
)
def test_bad_rows_are_left_out_on_every_rank(
    inputs: Inputs, workers: PoolKeeper, tmp_path: Path, layout: list[str]
) -> None:
    """No rank waits for another, and training is that on the rows which are left."""
    skipped, kept = tmp_path / "skipped", tmp_path / "kept"
    damaged = inputs.damaged(tmp_path / "damaged", all_of_them)
    _, err = succeed(workers, 2, [*inputs.train(skipped, damaged, "data.on_error=skip"), *layout])
    assert "dropped 2 of" in err and ": unreadable_row (first: " in err
    assert ": unusable_row (first: " in err and "dropped 1 of" in err and ": broken_image (first: " in err
    [folder] = (skipped / "run" / "index").iterdir()
    assert len((folder / "mistakes.txt").read_text().splitlines()) == 5

    def leave_out(rows: Rows, _folder: Path) -> None:
        for index in (8, 6, 4, 3, 2):
            del rows[index]

    succeed(workers, 2, [*inputs.train(kept, inputs.damaged(tmp_path / "good", leave_out)), *layout])
    assert losses(skipped) == losses(kept)


def test_a_tokenizer_that_is_larger_than_the_model(inputs: Inputs, workers: PoolKeeper, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = tmp_path / "model"
    model.mkdir()
    for file in inputs.model("qwen3_vl").iterdir():
        (model / file.name).symlink_to(file)
    tokenizer = AutoTokenizer.from_pretrained(inputs.model("qwen3_vl"))
    vocab_size = json.loads((model / "config.json").read_text())["text_config"]["vocab_size"]
    tokenizer.add_tokens([f"[word{number}]" for number in range(vocab_size)])
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink()
    tokenizer.save_pretrained(model)

    def unknown_word(rows: Rows, folder: Path) -> None:
        rows[1]["messages"][1]["content"] = f"[word{vocab_size - 1}]"

    words = inputs.train(tmp_path, f"model.hf_dir={model}", inputs.damaged(tmp_path / "damaged", unknown_word))
    check_refused_by_all(workers, words, "rows.jsonl:2", "token id", f"below the model's vocabulary size {vocab_size}")


def test_a_checkpoint_of_something_else(inputs: Inputs, workers: PoolKeeper, tmp_path: Path) -> None:
    llava = f"model.hf_dir={inputs.model('llava')}"
    words = inputs.train(tmp_path, llava, "train.train_iters=1")
    succeed(workers, 2, words)
    step_1 = tmp_path / "run" / "checkpoints" / "step_00000001"
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    for overrides, parts in (
        ([], ["got a checkpoint of another model (llava)", "(qwen3_vl)"]),
        ([llava, "train.seed=77"], ["train.seed: got 77; expected 1234"]),
        ([llava, "optimizer.freeze_vit=true"], ["optimizer.freeze_*: got frozen ['vision']; expected nothing"]),
    ):
        check_refused_by_all(workers, inputs.train(tmp_path, *overrides), *parts, str(step_1), only=False)
    # Neither the checkpoint nor the run's own files have been touched, and the run goes on.
    check_intact(step_1)
    assert (tmp_path / "run" / "recipe.yaml").read_text() == recipe
    words = inputs.train(tmp_path, llava, "train.train_iters=2")
    succeed(workers, 2, words)
    assert sorted(losses(tmp_path)) == [1, 2]


def test_a_loss_that_is_not_finite(inputs: Inputs, workers: PoolKeeper, tmp_path: Path) -> None:
    words = inputs.train(tmp_path, "train.train_iters=2", "checkpoint.save_steps=2")
    succeed(workers, 2, words)
    step_2 = tmp_path / "run" / "checkpoints" / "step_00000002"
    words = inputs.train(tmp_path, "train.train_iters=6", "optimizer.lr=1e30")
    (code, _, err), (other_code, _, other_err) = workers(2).run(call, words=words)
    assert code == other_code == 1
    the_error(err, "step 4, rank 0", "not finite", "rows.jsonl:", only=False)
    assert "megavlm:" not in other_err
    check_intact(step_2)
    succeed(workers, 2, inputs.train(tmp_path))
    assert sorted(losses(tmp_path)) == [1, 2, 3]


def break_a_gradient(words: list[str], name: str) -> None:
    """In a worker: a step in which one parameter's gradient becomes infinite, on the ranks that hold it."""
    from megavlm.config.load import load_recipe
    from megavlm.models.names import named_parameters
    from megavlm.train.state import build_state
    from megavlm.train.step import train_step

    state = build_state(load_recipe(words[0], words[1:]))
    for model in state.models:
        for found, parameter in named_parameters(model):
            if found == name:
                parameter.register_hook(lambda gradient: gradient * float("inf"))
    train_step(state, 0)


def test_a_gradient_that_is_not_finite(inputs: Inputs, workers: PoolKeeper, tmp_path: Path) -> None:
    words = inputs.train(tmp_path, "parallel.pipeline_model_parallel_size=2")[1:]
    with pytest.raises(WorkerError) as caught:
        workers(2).run(break_a_gradient, words=words, name="language.decoder.final_layernorm.weight")
    for rank in (0, 1):
        message = caught.value.tracebacks[rank].strip().splitlines()[-1]
        assert f"RunError: step 1, rank {rank}: gradient of language is not finite" in message
        assert "first seen in language.decoder.final_layernorm.weight (rank 1)" in message
        assert "rows.jsonl:1, " in message


def cut_off_image(rows: Rows, folder: Path) -> None:
    """Of row 7: its header is whole, so that nobody notices before it is decoded, in step 2 on data rank 0 or 1."""
    whole = Path(rows[6]["images"][0]).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    for row in (rows[6], rows[7]):
        row["images"] = []
        row["messages"][0]["content"] = "no image"
    rows[5]["images"] = [str(folder / "cut.png")]
    rows[5]["messages"][0]["content"] = "<image>what is this?"


def test_an_image_that_one_rank_cannot_decode(inputs: Inputs, tmp_path: Path) -> None:
    damaged = inputs.damaged(tmp_path / "damaged", cut_off_image)
    words = inputs.train(tmp_path, damaged, "checkpoint.save_steps=1", "data.dataloader_num_workers=1")
    with started([*words, "--nproc", "2"], tmp_path) as run:
        assert run.end() == 2
        the_error(run.text(), "rank 1", "rows.jsonl:6", "cut.png", "unreadable image", only=False)
    assert sorted(losses(tmp_path)) == [1]
    assert checkpoints(tmp_path) == ["latest", "step_00000001"]
    check_intact(tmp_path / "run" / "checkpoints" / "step_00000001")


def test_an_image_that_cannot_be_decoded_in_one_process(inputs: Inputs, workers: PoolKeeper, tmp_path: Path) -> None:
    damaged = inputs.damaged(tmp_path / "damaged", cut_off_image)
    [(code, _, err)] = workers(1).run(call, words=inputs.train(tmp_path, damaged, "checkpoint.save_steps=1"))
    assert code == 2
    the_error(err, "rows.jsonl:6", "cut.png", "unreadable image", only=False)
    check_intact(tmp_path / "run" / "checkpoints" / "step_00000001")
    # Mended, the run goes on behind the last good step.
    repaired = inputs.train(tmp_path)
    succeed(workers, 1, repaired)
    assert sorted(losses(tmp_path)) == [1, 2, 3]


def test_a_disk_that_is_full(inputs: Inputs, workers: PoolKeeper, tmp_path: Path) -> None:
    succeed(workers, 2, inputs.train(tmp_path, "train.train_iters=1"))
    step_1 = tmp_path / "run" / "checkpoints" / "step_00000001"
    largest_bytes = max(path.stat().st_size for path in step_1.iterdir())
    # A limit on the size of files fails the same writes as a full disk does, and needs no rights to mount one.
    limit = ["bash", "-c", f'ulimit -f {largest_bytes // 1024 // 2}; exec "$@"', "limited"]
    with started([*inputs.train(tmp_path), "--nproc", "2"], tmp_path, prefix=limit) as run:
        assert run.end() == 1
        the_error(run.text(), "step 3", "cannot save", "step_00000003", "is the disk full?", only=False)
    assert checkpoints(tmp_path) == ["latest", "step_00000001"]
    check_intact(step_1)
    succeed(workers, 2, inputs.train(tmp_path))
    assert sorted(losses(tmp_path)) == [1, 2, 3]


def test_a_rank_that_is_killed(inputs: Inputs, tmp_path: Path) -> None:
    words = inputs.train(tmp_path, "train.train_iters=100000", "checkpoint.save_steps=2", "checkpoint.keep_last=0")
    with started([*words, "--nproc", "2"], tmp_path) as run:
        run.wait_for(lambda: any(row["step"] >= 3 for row in log_rows(tmp_path)))
        ranks = run.ranks()
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        assert run.end(within_s=GONE_WITHIN_S) == 1
        the_error(run.text(), "rank 1 was killed by SIGKILL", only=False)
    check_intact(tmp_path / "run" / "checkpoints" / "step_00000002")


def test_a_rank_that_stands_still_in_a_schedule(inputs: Inputs, tmp_path: Path) -> None:
    """The others wait for the time-out, and then say in which action they waited."""
    words = inputs.train(tmp_path, "train.train_iters=100000", "train.distributed_timeout_s=4")
    words += ["parallel.pipeline_model_parallel_size=2", "parallel.vision_placement=bubble"]
    with started([*words, "--nproc", "2"], tmp_path) as run:
        run.wait_for(lambda: any(row["step"] >= 3 for row in log_rows(tmp_path)))
        os.kill(run.ranks()[1], signal.SIGSTOP)
        assert run.end(within_s=GONE_WITHIN_S) == 1
        said = the_error(run.text(), "rank 0", only=False)
        assert "waited for receive(" in said or "Timed out" in said, said
