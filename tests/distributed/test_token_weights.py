"""Weights of tokens that change during training, and chat templates of a run, from the recipe to what is exported."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.config.schema import Recipe, TokenWeightPhase
from tests.distributed.running import Inputs, losses, succeed
from tests.invariant import canon
from tests.pool import PoolKeeper

RUNS = "tests.invariant.runs"
SCHEDULE = (
    TokenWeightPhase(special=1.0, instruction=1.0),
    TokenWeightPhase(instruction=0.5, from_progress=0.4),
    TokenWeightPhase(from_progress=0.8),
)
NUM_STEPS = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    canon.write_inputs(folder)
    return folder


def recipe_of(root: Path, out: Path, **changes: Any) -> Recipe:
    data = {"token_weight_schedule": SCHEDULE, **changes.pop("data", {})}
    train = {"train_iters": NUM_STEPS, "num_train_epochs": 0.0}
    recipe = canon.recipe(root, data=data, train=train, **changes)
    return dataclasses.replace(recipe, output_dir=str(out))


def test_weights_follow_the_step_in_every_layout_and_after_resuming(
    root: Path, tmp_path: Path, workers: PoolKeeper
) -> None:
    whole = workers(1).run(f"{RUNS}:train", recipe=recipe_of(root, tmp_path / "whole"), num_steps=NUM_STEPS)[0]
    expected = workers(1).run(expected_counts, recipe=recipe_of(root, tmp_path / "counted"))[0]
    assert [row.count for row in whole] == pytest.approx(expected)
    layouts: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
        (1, {}, {}),
        (2, {}, {"packing": True, "packing_length": 4096}),
        (2, {"pipeline_model_parallel_size": 2, "vision_placement": "stage"}, {"dataloader_num_workers": 1}),
    ]
    out = tmp_path / "parts"
    before = recipe_of(root, out)
    first = workers(1).run(f"{RUNS}:train_and_save", recipe=before, num_steps=2)[0]
    for number, (world_size, parallel, data) in enumerate(layouts):
        recipe = recipe_of(root, tmp_path / f"after{number}", parallel=parallel, data=data)
        load = str(out / "canonical" / "checkpoints")
        recipe = dataclasses.replace(recipe, checkpoint=dataclasses.replace(recipe.checkpoint, load_dir=load))
        rest = workers(world_size).run(f"{RUNS}:resume_and_train", recipe=recipe, num_steps=NUM_STEPS - 2)[0]
        for row, other in zip([*first, *rest], whole, strict=True):
            assert row.count == pytest.approx(other.count, rel=1e-6)
            assert row.loss == pytest.approx(other.loss, rel=1e-5)


def expected_counts(recipe: Recipe) -> list[float]:
    """In a worker: sums of weights of each step, from the tokens themselves: what is an answer, a text, an image."""
    from megavlm.train.state import build_state

    state = build_state(recipe)
    tokenizer = state.train_set.encoder.tokenizer
    counts = []
    for step in range(NUM_STEPS):
        total = 0.0
        for index in state.plan.global_batch_indices(step).tolist():
            sample, encoded = state.train_set.sample(index), state.train_set.encoded(index)
            text = sum(int(token) != tokenizer.image_token_id for token in encoded.tokens_S[1:])
            answers = sum(
                turn.loss_scale * (len(tokenizer.encode_text(turn.text)) + 1)
                for turn in sample.turns
                if turn.role == "assistant"
            )
            plain = sum(len(tokenizer.encode_text(turn.text)) + 1 for turn in sample.turns if turn.role == "assistant")
            questions = sum(
                len(tokenizer.encode_text(turn.text.replace("<image>", "")))
                for turn in sample.turns
                if turn.role == "user"
            )
            total += [answers + text - plain, answers + text - plain, answers + 0.5 * questions,
                      answers + 0.5 * questions, answers][step]  # fmt: skip
        counts.append(total)
    return counts


@torch.no_grad()
def test_the_template_of_a_run_goes_with_its_export(inputs: Inputs, workers: PoolKeeper, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from megavlm.data.sample import Turn
    from megavlm.data.tokens import Tokenizer

    hf_dir = inputs.model("llava")
    plain = inputs.train(tmp_path / "plain", f"model.hf_dir={hf_dir}", "train.train_iters=1")
    chosen = inputs.train(tmp_path / "chosen", f"model.hf_dir={hf_dir}", "train.train_iters=1", "data.template=vicuna")
    for words in (plain, chosen):
        succeed(workers, 1, words)
    assert losses(tmp_path / "plain") != losses(tmp_path / "chosen")
    for name in ("plain", "chosen"):
        native = str(tmp_path / name / "run" / "checkpoints")
        out = str(tmp_path / f"exported_{name}")
        succeed(workers, 1, ["convert", "export", "--checkpoint", native, "--hf-dir", str(hf_dir), "--out", out])
    source = (hf_dir / "chat_template.jinja").read_text()
    assert (tmp_path / "exported_plain" / "chat_template.jinja").read_text() == source
    exported = tmp_path / "exported_chosen"
    assert (exported / "chat_template.jinja").read_text() != source
    hf = AutoTokenizer.from_pretrained(exported)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    assert hf.apply_chat_template(messages, tokenize=False) == "USER: <image>\nwhat? ASSISTANT: red</s>"
    turns = [Turn("user", "<image>what?"), Turn("assistant", "red")]
    image = hf.convert_tokens_to_ids("<image>")
    trained = Tokenizer(hf_dir, image, template="vicuna").encode_chat(turns)
    assert Tokenizer(exported, image).encode_chat(turns).tokens_S.tolist() == trained.tokens_S.tolist()
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [hf.eos_token_id]
    others = json.loads((hf_dir / "generation_config.json").read_text())
    assert {**generation, "eos_token_id": 0} == {**others, "eos_token_id": 0}
