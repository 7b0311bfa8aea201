"""Rounds of iterative fine-tuning without a model: what is kept, where things are, and what is done already."""

import dataclasses
import json

import pytest

from megavlm.config.iterate import IterateConfig, check_iterate
from megavlm.config.load import recipe_from_dict
from megavlm.data.rows import Rows
from megavlm.data.sample import Sample, Turn
from megavlm.errors import RunError, UseError
from megavlm.train.kept import Answered, exact_rewards, kept_answers, summary_of, with_answer
from megavlm.train.rounds import Round, hold_recipe, keep, read_answered, write_answered

SAMPLE = Sample("rows.jsonl:1", (Turn("user", "?"), Turn("assistant", "red "), Turn("tool_call", "{}")))
ANSWERED = Answered(0, ("a", "b", None, "a", "c"), (0.2, 0.9, None, 0.7, 0.6))


@pytest.fixture
def recipe(tmp_path):
    tree = {
        "name": "loop",
        "output_dir": str(tmp_path),
        "model": {"hf_dir": "start"},
        "data": {"train": ["rows.jsonl"]},
    }
    return recipe_from_dict(tree)


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({"threshold": 0.5, "num_kept": 1}, ["b"]),
        ({"threshold": 0.5, "num_kept": 0}, ["b", "a", "c"]),
        ({"threshold": 0.65, "num_kept": 0}, ["b", "a"]),
        ({"threshold": 0.95, "num_kept": 0}, []),
    ],
)
def test_the_best_different_answers_are_kept(knobs, expected):
    assert [text for text, _ in kept_answers(ANSWERED, IterateConfig(**knobs))] == expected


def test_the_rows_own_answer_is_worth_one():
    assert exact_rewards(dataclasses.replace(SAMPLE, turns=SAMPLE.turns[:2]), ("red", "blue", None)) == (1.0, 0.0, None)
    assert with_answer(SAMPLE, "blue").turns == (SAMPLE.turns[0], Turn("assistant", "blue"))


def test_a_summary_counts():
    other = Answered(1, (None, "d"), (None, 0.1))
    summary = summary_of([ANSWERED, other], [[("b", 0.9), ("a", 0.7)], []])
    counts = {"questions": 2, "answers": 7, "unfinished": 2, "kept": 2, "questions_with_kept": 1}
    assert {name: summary[name] for name in counts} == counts
    assert summary["mean_reward"] == pytest.approx(0.5) and summary["mean_kept_reward"] == pytest.approx(0.8)


def test_a_round_begins_with_the_model_of_the_one_before(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, peft=dataclasses.replace(recipe.peft, tuner_type="lora", adapters="first"))
    first, second = Round(recipe, 1), Round(recipe, 2)
    assert first.model_dir == "start"
    assert second.model_dir == second.training.model.hf_dir == str(tmp_path / "loop" / "round_1" / "exported")
    assert (first.training.peft.adapters, second.training.peft.adapters) == ("first", "")
    assert second.training.data.train == (str(second.kept),)
    both = dataclasses.replace(recipe, iterate=IterateConfig(keeps_rows=True))
    assert Round(both, 1).training.data.train == (str(first.kept), "rows.jsonl")
    assert second.checkpoints == tmp_path / "loop" / "round_2" / "train" / "checkpoints"
    assert not any(first.is_done(phase) for phase in ("sample", "score", "train", "export"))


def test_what_is_kept_is_written_as_rows(recipe, tmp_path):
    this = Round(recipe, 1)
    write_answered(this.answers, [dataclasses.replace(ANSWERED, rewards=())])
    assert read_answered(this.answers) == [dataclasses.replace(ANSWERED, rewards=())]
    summary = keep(this, {0: SAMPLE}, [ANSWERED])
    assert json.loads(this.summary.read_text()) == summary and summary["kept"] == 1
    (row,) = Rows.open([str(this.kept)])
    assert [turn.text for turn in row.turns] == ["?", "b"] and row.extra == {"reward": 0.9}
    assert read_answered(this.scored) == [ANSWERED]
    assert this.is_done("score")
    with pytest.raises(RunError, match="round 2: of 5 answers none reaches iterate.threshold 0.95"):
        strict = dataclasses.replace(recipe, iterate=IterateConfig(threshold=0.95))
        keep(Round(strict, 2), {0: SAMPLE}, [ANSWERED])
    assert not Round(recipe, 2).is_done("score")


@pytest.mark.parametrize("line", ['{"row": 0}', '{"row": "0", "answers": []}', '{"row": 0, "answers": [1]}', "{"])
def test_answers_of_another_form_are_named(tmp_path, line):
    (tmp_path / "answers.jsonl").write_text('{"row": 0, "answers": ["a"]}\n' + line + "\n")
    with pytest.raises(UseError, match=r"answers.jsonl:2: got"):
        read_answered(tmp_path / "answers.jsonl")


def test_a_loop_goes_on_as_it_began_but_for_longer(recipe):
    hold_recipe(recipe)
    hold_recipe(dataclasses.replace(recipe, iterate=IterateConfig(num_rounds=9, threshold=0.1)))
    hold_recipe(recipe)
    keep(Round(recipe, 1), {0: SAMPLE}, [ANSWERED])
    hold_recipe(dataclasses.replace(recipe, iterate=IterateConfig(num_rounds=9)))
    with pytest.raises(UseError, match="iterate.num_kept: got 2; expected 1, as the rounds in"):
        hold_recipe(dataclasses.replace(recipe, iterate=IterateConfig(num_kept=2)))


@pytest.mark.parametrize(
    ("section", "values", "complaint"),
    [
        ("train", {"stage": "rm"}, "train.stage: got rm; expected sft"),
        ("iterate", {"reward": "reward_model"}, "iterate.reward_model"),
        ("iterate", {"reward_model": "judge"}, "iterate.reward_model"),
        ("iterate", {"temperature": 0.0}, "answers would all be the same"),
        ("checkpoint", {"load_dir": "x"}, "checkpoint.load_dir"),
        ("checkpoint", {"save_at_end": False}, "checkpoint.save_at_end"),
        ("peft", {"tuner_type": "prefix"}, "peft.tuner_type: got prefix"),
    ],
)
def test_a_recipe_that_cannot_be_iterated_is_refused(recipe, section, values, complaint):
    changed = dataclasses.replace(vars(recipe)[section], **values)
    with pytest.raises(UseError, match=complaint):
        check_iterate(dataclasses.replace(recipe, **{section: changed}))
