"""The stages of pretraining, each from the export of the one before; and a schedule that ends early."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig

from megavlm.config.load import load_recipe
from tests.distributed.running import REPO_DIR, Inputs, call, checkpoints, log_rows, losses, succeed, the_error
from tests.pool import PoolKeeper

RECIPES = ("pretrain_0_align", "pretrain_1_all", "pretrain_2_32k", "pretrain_3_262k")
YARN = ["model.rope_scaling.rope_type=yarn", "model.rope_scaling.factor=4"]
YARN += ["model.rope_scaling.original_max_position_embeddings=1024"]
# What tells a stage from the one before, on a tiny model: of the recipes of real size, with fewer layers and steps.
STAGES: tuple[tuple[int, list[str]], ...] = (
    (1, ["optimizer.freeze_vit=true", "optimizer.freeze_llm=true"]),
    (
        2,
        ["parallel.pipeline_model_parallel_size=2", "parallel.vision_placement=bubble", "optimizer.clip_grad_by=layer"]
        + ["optimizer.vit_layer_decay=0.9", "optimizer.llm_layer_decay=0.95", "optimizer.unfreeze_warmup_iters=2"]
        + ["optimizer.unfreeze=0: projector, vision[-2:]; 0.34: vision; 2: language"],
    ),
    (1, ["data.max_length=1024", "data.packing=true"]),
    (2, [*YARN, "data.max_length=4096", "parallel.context_parallel_size=2", "parallel.cp_comm_type=p2p"]),
)


def evaluations(out_dir: Path) -> list[float]:
    """Losses on the held-out rows, in order."""
    return [row["loss"] for row in log_rows(out_dir) if row["kind"] == "eval"]


def test_every_stage_goes_on_from_the_export_of_the_one_before(
    inputs: Inputs, workers: PoolKeeper, tmp_path: Path
) -> None:
    hf_dir = inputs.model("qwen3_vl")
    found, exports = [], [hf_dir]
    for number, (num_processes, knobs) in enumerate(STAGES):
        folder = tmp_path / f"stage{number}"
        words = [f"model.hf_dir={hf_dir}", f"data.eval=[{inputs.rows}]", *knobs]
        succeed(workers, num_processes, inputs.train(folder, *words))
        out = tmp_path / f"export{number}"
        arguments = ["--hf-dir", str(hf_dir), "--checkpoint", str(folder / "run" / "checkpoints"), "--out", str(out)]
        succeed(workers, 1, ["convert", "export", *arguments])
        found.append(evaluations(folder))
        exports.append(out)
        hf_dir = out
    for before, after in zip(found[:2], found[1:3], strict=True):
        assert after[0] == pytest.approx(before[-1], rel=1e-5) and after[-1] < after[0]
    # stretched frequencies are another function of the same weights, which learns to be as good
    assert found[3][0] != pytest.approx(found[2][-1], rel=1e-4) and found[3][-1] < found[3][0]

    weights = [load_file(folder / "model.safetensors") for folder in exports]
    changed = [
        {name for name, tensor in after.items() if not tensor.equal(before[name])}
        for before, after in zip(weights[:-1], weights[1:], strict=True)
    ]
    assert changed[0] and all("merger" in name for name in changed[0])
    assert {name for name in weights[0] if "blocks.0." in name} <= changed[1]
    assert any("language_model.layers.0." in name for name in changed[1])

    stretched, plain = (json.loads((folder / "config.json").read_text()) for folder in (exports[4], exports[3]))
    text = stretched["text_config"]
    assert text["max_position_embeddings"] == 4096 and plain["text_config"]["max_position_embeddings"] == 2048
    rope = AutoConfig.from_pretrained(exports[4]).text_config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 1024)
    assert rope["mrope_section"] == AutoConfig.from_pretrained(exports[3]).text_config.rope_parameters["mrope_section"]


def test_checkpoints_of_a_stretched_model_know_it(inputs: Inputs, workers: PoolKeeper, tmp_path: Path) -> None:
    """A resumed run needs the same frequencies."""
    words = inputs.train(tmp_path, *YARN, "train.train_iters=1")
    succeed(workers, 1, words)
    plain = [word for word in words if not word.startswith("model.rope_scaling")]
    code, _, err = workers(1).run(call, words=plain)[0]
    assert code == 2
    the_error(err, "model.rope_scaling", "got what the model came with", "'factor': 4.0", only=False)


def test_the_recipes_of_real_size_are_a_chain() -> None:
    recipes = [load_recipe(str(REPO_DIR / "examples" / "recipes" / f"{name}.yaml"), []) for name in RECIPES]
    for before, after in zip(recipes[:-1], recipes[1:], strict=True):
        assert after.model.hf_dir == f"{before.run_dir}/{Path(before.model.hf_dir).name}"
    lengths = [recipe.data.max_length for recipe in recipes]
    assert lengths == sorted(lengths) and lengths[2:] == [32768, 262144]


def test_a_schedule_ends_early_and_keeps_its_best(inputs: Inputs, workers: PoolKeeper, tmp_path: Path) -> None:
    """Early stopping and the best checkpoint go by the held-out loss, whatever has been unfrozen by then; also over a
    resume into another layout just before the last part begins to learn."""
    words = inputs.train(
        tmp_path,
        f"data.eval=[{inputs.rows}]",
        "train.eval_steps=1",
        "checkpoint.save_steps=1",
        "checkpoint.keep_last=1",
        "checkpoint.keep_best=1",
        # the first evaluation of a step stays the best, by far
        "train.early_stopping_patience=4",
        "train.early_stopping_threshold=1000",
        "optimizer.vit_layer_decay=0.8",
        "optimizer.llm_layer_decay=0.8",
        "optimizer.clip_grad_by=layer",
        # what is unfrozen last learns so fast that the loss rises: the best checkpoint is an earlier one
        "optimizer.lr=20",
        "optimizer.vit_lr=1e-4",
        "optimizer.aligner_lr=1e-4",
        "optimizer.unfreeze=0: projector; 1: vision; 2: language",
    )
    succeed(workers, 1, [*words, "train.train_iters=3", "checkpoint.save_steps=2", "train.early_stopping_patience=0"])
    first = evaluations(tmp_path)
    assert len(first) == 4 and first[3] > first[2]
    assert checkpoints(tmp_path) == ["latest", "step_00000002", "step_00000003"]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000003")
    succeed(workers, 2, [*words, "train.train_iters=9", "parallel.pipeline_model_parallel_size=2"])
    found = evaluations(tmp_path)
    assert found[:3] == first[:3] and min(found[3:]) > first[2]
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4]
    assert checkpoints(tmp_path) == ["latest", "step_00000002", "step_00000004"]
    (end,) = [row for row in log_rows(tmp_path) if row.get("event") == "end" and "fall" in row["text"]]
    assert end["text"].startswith("4 steps")
