"""Stages on pairs of answers from the command line: rows to log, checkpoint, export, and what is refused."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megavlm.data.rows import Rows
from megavlm.data.sample import Sample
from megavlm.evaluate.transformers_generate import model_inputs
from tests.distributed.running import Inputs, call, log_rows, losses, succeed, the_error
from tests.pool import PoolKeeper

PP2 = ["parallel.pipeline_model_parallel_size=2"]
REWARDS = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}


@pytest.fixture(scope="module")
def pairs(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of `inputs`, each with a worse answer."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [json.loads(line) for line in inputs.rows.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["images"] = [str(inputs.root / image) for image in row["images"]]
        row["rejected_response"] = " ".join(["lazy dog over red"] * (1 + number % 3))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train_words(inputs: Inputs, out_dir: Path, rows: Path, stage: str, *words: str) -> list[str]:
    """Words of a run of a stage that learns from these rows, and holds the same ones out."""
    common = [f"data.train=[{rows}]", f"data.eval=[{rows}]", "data.max_pixels=0", f"train.stage={stage}"]
    return inputs.train(out_dir, *common, *words)


def our_scores(hf_dir: str, rows: str, max_pixels: int = 0) -> list[tuple[list[int], float]]:
    """In a worker: tokens of the first rows' chosen conversations, and what a directory's model gives each."""
    from megavlm.checkpoint.hf_io import HFDirectory
    from megavlm.checkpoint.hf_load import load_weights
    from megavlm.data.encode import open_encoder
    from megavlm.data.packing import pack
    from megavlm.data.pixels import load_sample_patches
    from megavlm.train.single import build_single
    from megavlm.train.stages.reward import answer_scores

    directory = HFDirectory(hf_dir)
    encoder = open_encoder(hf_dir, directory.architecture.inputs, 512, max_pixels=max_pixels)
    model = build_single(directory, "fp32")
    load_weights(directory, model.parts)
    found = []
    for sample in list(Rows.open([rows]))[:3]:
        row = encoder.encode(sample)
        sizes = {"sample_multiple": 1, "total_multiple": 1, "pad_token_id": 0}
        channels = directory.architecture.inputs.patch_channels
        batch = pack([row], load_sample_patches(row, encoder), patch_channels=channels, **sizes)
        with torch.no_grad():
            scores_L1 = model.logits(batch, torch.device("cpu"))
            found.append((row.tokens_S.tolist(), float(answer_scores(scores_L1, batch, model.groups, "last_token"))))
    return found


@torch.no_grad()
def transformers_scores(hf_dir: str, sample: Sample, tokens: list[int]) -> torch.Tensor:
    """As transformers' classification of tokens does it: its model without head, and `score.weight` on every token.

    It has no such class for models with images, so the two are put together here. Classification of sequences reads
    the last.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    assert AutoConfig.from_pretrained(hf_dir).num_labels == 1
    model, info = AutoModel.from_pretrained(hf_dir, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and set(info["unexpected_keys"]) == {"score.weight"}
    processor, tokenizer = AutoImageProcessor.from_pretrained(hf_dir), AutoTokenizer.from_pretrained(hf_dir)
    arguments: dict[str, Any] = model_inputs([sample], tokenizer, processor, model)
    arguments["input_ids"] = torch.tensor([tokens])
    arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
    if "mm_token_type_ids" in arguments:
        arguments["mm_token_type_ids"] = (arguments["input_ids"] == model.config.image_token_id).int()
    hidden_SH = model.eval()(**arguments).last_hidden_state[0]
    return hidden_SH @ load_file(f"{hf_dir}/model.safetensors")["score.weight"][0]


@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_a_reward_model_is_trained_and_exported(
    inputs: Inputs, pairs: Path, workers: PoolKeeper, tmp_path: Path, family: str
) -> None:
    hf_dir = str(inputs.model(family))
    knobs = [f"model.hf_dir={hf_dir}", "optimizer.lr=1e-2", "reward.center_rewards_coefficient=0.01", *PP2]
    succeed(workers, 2, train_words(inputs, tmp_path, pairs, "rm", "train.train_iters=4", *knobs))
    rows = [row for row in log_rows(tmp_path) if row["kind"] == "train"]
    assert set(rows[0]["extra"]) >= REWARDS | {"calibration_error"} and rows[0]["num_tokens"] == 4
    held_out = [row for row in log_rows(tmp_path) if row["kind"] == "eval"]
    assert held_out[-1]["rewards/margins"] > held_out[0]["rewards/margins"]
    assert held_out[-1]["num_tokens"] == 12

    native, exported = str(tmp_path / "run" / "checkpoints"), str(tmp_path / "exported")
    succeed(workers, 1, ["convert", "export", "--checkpoint", native, "--hf-dir", hf_dir, "--out", exported])
    config = json.loads(Path(exported, "config.json").read_text())
    assert config["num_labels"] == config["text_config"]["num_labels"] == 1
    assert all(name.endswith("ForSequenceClassification") for name in config["architectures"])
    (found,) = workers(1).run(our_scores, hf_dir=exported, rows=str(pairs))
    assert len({score for _tokens, score in found}) == 3
    for sample, (tokens, score) in zip(Rows.open([str(pairs)]), found, strict=False):
        assert float(transformers_scores(exported, sample, tokens)[-1]) == pytest.approx(score, rel=0, abs=1e-5)

    # What was exported is a reward model again: to go on with, to convert, and for no other stage.
    again = tmp_path / "again"
    succeed(workers, 1, train_words(inputs, again, pairs, "rm", f"model.hf_dir={exported}", "train.train_iters=1"))
    first = [row for row in log_rows(again) if row["kind"] == "eval"][0]
    assert first["rewards/margins"] == pytest.approx(held_out[-1]["rewards/margins"], rel=1e-4)
    imported = str(tmp_path / "imported")
    succeed(workers, 1, ["convert", "import", "--hf-dir", exported, "--out", imported])
    out, _ = succeed(workers, 1, ["convert", "diff", imported, exported])
    assert out.startswith("equal")
    code, _, err = workers(1).run(call, words=inputs.train(tmp_path / "sft", f"model.hf_dir={exported}"))[0]
    assert code == 2
    the_error(err, "model.hf_dir", "a reward model", "train.stage=rm", only=False)
    code, _, err = workers(1).run(call, words=["generate", "--hf-dir", exported, "--prompt", "what?"])[0]
    assert code == 2
    the_error(err, exported, "a reward model for answers")
    for words in (
        ["convert", "export", "--checkpoint", native, "--hf-dir", exported, "--out", str(tmp_path / "more")],
    ):
        succeed(workers, 1, words)


def test_dpo_begins_at_ln_2_and_goes_on_with_its_reference(
    inputs: Inputs, pairs: Path, workers: PoolKeeper, tmp_path: Path
) -> None:
    words = ["preference.beta=0.5", "train.eval_steps=2", *PP2]
    succeed(workers, 2, train_words(inputs, tmp_path / "whole", pairs, "dpo", "train.train_iters=4", *words))
    whole = losses(tmp_path / "whole")
    assert whole[1] == pytest.approx(math.log(2), rel=0, abs=1e-6)
    assert whole[4] < whole[1] - 0.01
    rows = [row for row in log_rows(tmp_path / "whole") if row["kind"] == "train"]
    assert rows[0]["extra"]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["extra"]["rewards/margins"] > 0.1
    assert {row["images_per_second"] > 0 for row in rows} == {True}

    # The second attempt starts from other weights than the reference's; what the first one wrote is used.
    words += ["checkpoint.save_steps=2", "optimizer.lr_decay_style=constant"]
    succeed(workers, 2, train_words(inputs, tmp_path / "halves", pairs, "dpo", "train.train_iters=2", *words))
    references = sorted((tmp_path / "halves" / "run" / "reference").iterdir())
    assert len(references) == 1, "training and held-out rows are the same here"
    written = references[0].stat().st_mtime_ns
    succeed(workers, 2, train_words(inputs, tmp_path / "halves", pairs, "dpo", "train.train_iters=4", *words))
    assert references[0].stat().st_mtime_ns == written
    assert losses(tmp_path / "halves") == whole


def _other_weights(inputs: Inputs, out_dir: Path, workers: PoolKeeper) -> str:
    """A native checkpoint of the same model with other weights, as `convert import` writes it."""
    hf_dir = out_dir / "other"
    shutil.copytree(inputs.model("qwen3_vl"), hf_dir)
    weights = load_file(hf_dir / "model.safetensors")
    for tensor in weights.values():
        tensor.mul_(0.7)
    save_file(weights, hf_dir / "model.safetensors", metadata={"format": "pt"})
    imported = str(out_dir / "imported")
    succeed(workers, 1, ["convert", "import", "--hf-dir", str(hf_dir), "--out", imported])
    return imported


def test_the_reference_of_imported_weights_is_what_they_say(
    inputs: Inputs, pairs: Path, workers: PoolKeeper, tmp_path: Path
) -> None:
    imported = _other_weights(inputs, tmp_path, workers)
    words = train_words(inputs, tmp_path, pairs, "dpo", "preference.beta=0.5", "checkpoint.save_steps=1")
    succeed(workers, 1, [*words, "train.train_iters=1", f"checkpoint.load_dir={imported}"])
    assert losses(tmp_path)[1] == pytest.approx(math.log(2), rel=0, abs=1e-6)
    folder = tmp_path / "run" / "reference"
    (written,) = folder.iterdir()

    # The run goes on with what was written, whether load_dir is still there or not; and with nothing else.
    before, reference_NQ = written.stat().st_mtime_ns, np.load(written)
    succeed(workers, 1, [*words, "train.train_iters=2"])
    assert list(folder.iterdir()) == [written] and written.stat().st_mtime_ns == before
    written.unlink()
    code, _, err = workers(1).run(call, words=[*words, "train.train_iters=3"])[0]
    assert code == 2
    the_error(err, "reference", "no such file", "checkpoint.load_dir", only=False)
    succeed(workers, 1, [*words, "train.train_iters=3", f"checkpoint.load_dir={imported}"])
    assert np.array_equal(np.load(written), reference_NQ) and len(losses(tmp_path)) == 3


def test_other_adapters_have_a_reference_of_their_own(
    inputs: Inputs, pairs: Path, workers: PoolKeeper, tmp_path: Path
) -> None:
    """A prefix is there from the first step on: the model that training starts from is not the directory's."""
    words = train_words(inputs, tmp_path, pairs, "dpo", "train.train_iters=1", "checkpoint.save_at_end=false")
    for number, tuner in enumerate(("lora", "prefix"), 1):
        succeed(workers, 1, [*words, "peft.components=vision: frozen, projector: frozen, language: " + tuner])
        assert losses(tmp_path)[1] == pytest.approx(math.log(2), rel=0, abs=1e-6)
        assert len(list((tmp_path / "run" / "reference").iterdir())) == number


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_adapters_are_compared_with_the_model_without_them(
    inputs: Inputs, pairs: Path, workers: PoolKeeper, tmp_path: Path, stage: str
) -> None:
    """Rows whose images change from step to step have no reference that could be kept."""
    rows = pairs
    if stage == "kto":
        rows = tmp_path / "marked.jsonl"
        lines = [json.loads(line) for line in pairs.read_text().splitlines()]
        for number, row in enumerate(lines):
            row["label"] = number % 2 == 0
            del row["rejected_response"]
        rows.write_text("".join(json.dumps(row) + "\n" for row in lines))
    words = [*PP2, "preference.beta=0.5", "train.train_iters=4", "optimizer.lr=1e-2", "peft.tuner_type=lora"]
    words += ["preference.reference=adapter_off", "data.augment_color_jitter=0.5"]
    succeed(workers, 2, train_words(inputs, tmp_path, rows, stage, *words))
    found = losses(tmp_path)
    assert found[1] == pytest.approx(math.log(2) if stage == "dpo" else 0.5, rel=0, abs=1e-6)
    assert found[4] < found[1] - 0.005 and not (tmp_path / "run" / "reference").exists()
    held_out = [row for row in log_rows(tmp_path) if row["kind"] == "eval"]
    assert held_out[-1]["rewards/margins"] > held_out[0]["rewards/margins"]


def test_an_image_of_both_answers_is_encoded_once(
    inputs: Inputs, pairs: Path, workers: PoolKeeper, tmp_path: Path
) -> None:
    """Counted by the patches that go through the tower; every second of the rows has one image."""
    words = train_words(inputs, tmp_path, pairs, "simpo")
    (pair,) = workers(1).run(num_tower_patches, words=words)
    (single,) = workers(1).run(num_tower_patches, words=[*words, "train.stage=sft"])
    assert pair == single > 0


def num_tower_patches(words: list[str]) -> int:
    """In a worker: patches that the vision tower gets in the first step."""
    from megavlm.config.load import load_recipe
    from megavlm.train.state import build_state
    from megavlm.train.step import train_step

    state = build_state(load_recipe(words[1], words[2:]))
    assert state.parts.encoder is not None
    seen = []
    state.parts.encoder.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    train_step(state, 0)
    return sum(seen)


def _break(row: dict[str, Any], how: str) -> None:
    if how == "no rejected":
        del row["rejected_response"]
    else:
        row["weight"] = 2.0


@pytest.mark.parametrize(
    ("how", "parts"),
    [
        ("no rejected", ("no answer that is worse", "train.stage=sft")),
        ("weight", ("weight", "none in rows of compared")),
    ],
)
def test_a_row_that_is_no_pair_ends_the_run(
    inputs: Inputs, pairs: Path, workers: PoolKeeper, tmp_path: Path, how: str, parts: tuple[str, ...]
) -> None:
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    _break(rows[2], how)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = train_words(inputs, tmp_path, tmp_path / "rows.jsonl", "dpo")
    code, _, err = workers(1).run(call, words=words)[0]
    assert code == 2
    the_error(err, "rows.jsonl:3", *parts, only=False)


@pytest.mark.parametrize(
    ("stage", "override", "parts"),
    [
        ("dpo", "data.too_long=cut_turns", ("data.too_long", "set data.too_long=drop")),
        ("dpo", "preference.loss_type=[sigmoid,aot]", ("preference.loss_type", "sigmoid_norm")),
        ("cpo", "preference.loss_type=[sigmoid,hinge]", ("preference.loss_type", "one of sigmoid, hinge, ipo")),
        ("dpo", "preference.loss_weights=[1,2]", ("preference.loss_weights", "one for each")),
        ("dpo", "preference.beta=0", ("preference.beta", "more than 0")),
        ("dpo", "data.augment_color_jitter=0.1", ("data.augment_", "the reference saw", "adapter_off")),
        ("dpo", "preference.reference=adapter_off", ("preference.reference", "learns with all its weights")),
        ("orpo", "preference.reference=adapter_off", ("preference.reference", "no reference")),
        ("rm", "optimizer.freeze_llm=true", ("optimizer.freeze_llm", "new head")),
        ("sft", "preference.beta=0.2", ("preference", "train.stage sft")),
        ("dpo", "reward.score_at=end_of_answer", ("reward.score_at", "train.stage=rm")),
    ],
)
def test_contradictions_are_one_line(
    inputs: Inputs, pairs: Path, workers: PoolKeeper, tmp_path: Path, stage: str, override: str, parts: tuple[str, ...]
) -> None:
    code, _, err = workers(1).run(call, words=train_words(inputs, tmp_path, pairs, stage, override))[0]
    assert code == 2
    the_error(err, *parts)
