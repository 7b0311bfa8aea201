"""Rows in steps: which tokens speak for a step, and with which mark."""

import dataclasses
import json

import pytest

from megavlm.data.encode import SampleEncoder
from megavlm.data.images import read_image_spec
from megavlm.data.inspect.write_rows import write_rows
from megavlm.data.rows import Rows
from megavlm.data.sample import Sample, Turn
from megavlm.data.steps import StepRule
from megavlm.data.tokens import Tokenizer
from megavlm.errors import UseError
from tests.unit.data.conftest import QWEN_INPUTS, draw_image

STEPS, LABELS = ("a red square", "the blue circle, over there", "so it is 7"), (True, False, True)


@pytest.fixture(scope="module")
def encoder_with(qwen_dir):
    tokenizer = Tokenizer(qwen_dir, QWEN_INPUTS.image_token_id, QWEN_INPUTS.has_borders)
    spec = read_image_spec(qwen_dir, QWEN_INPUTS)

    def make(*rule, kind="steps", template=""):
        chosen = Tokenizer(qwen_dir, QWEN_INPUTS.image_token_id, QWEN_INPUTS.has_borders, template)
        used = chosen if template else tokenizer
        return SampleEncoder(QWEN_INPUTS, spec, used, 512, row_kind=kind, step_rule=StepRule(*rule))

    return make


@pytest.fixture
def sample(tmp_path):
    turns = (Turn("user", "<image>what is it?"), Turn("assistant", "\n".join(STEPS)))
    image = str(draw_image(tmp_path / "a.png", 96, 64))
    return Sample("rows.jsonl:3", turns, (image,), steps=STEPS, step_labels=LABELS)


def read_up_to_marks(encoder, row):
    """What the model has read, behind the question, when it gives each mark; and the marks."""
    weights_S = row.loss_weights_S()
    ends = [place for place, weight in enumerate(weights_S) if weight]
    texts = [encoder.tokenizer.decode(row.tokens_S[: end + 1].tolist(), skip_special_tokens=False) for end in ends]
    return [text.rpartition("assistant\n")[2] for text in texts], weights_S[ends].tolist()


@pytest.mark.parametrize("separator", ["\n", "\n\n", " END"])
def test_the_last_token_of_a_steps_separator_speaks_for_it(encoder_with, sample, separator):
    encoder = encoder_with(separator)
    row = encoder.encode(sample)
    texts, marks = read_up_to_marks(encoder, row)
    assert texts == ["".join(step + separator for step in STEPS[:number]) for number in (1, 2, 3)]
    assert marks == [1.0, -1.0, 1.0]
    plain = encoder_with(kind="conversation").encode(
        dataclasses.replace(sample, turns=(sample.turns[0], Turn("assistant", texts[-1])))
    )
    assert row.tokens_S.tolist() == plain.tokens_S.tolist()
    assert (row.position_ids_3S == plain.position_ids_3S).all()


def test_a_template_that_trims_leaves_the_last_step_its_own_last_token(encoder_with, sample, tmp_path, qwen_dir):
    template = (qwen_dir / "chat_template.jinja").read_text()
    trimming = tmp_path / "trimming.jinja"
    trimming.write_text(template.replace("content.text }}", "content.text | trim }}"))
    assert trimming.read_text() != template
    encoder = encoder_with(template=str(trimming))
    texts, marks = read_up_to_marks(encoder, encoder.encode(sample))
    assert texts == [STEPS[0] + "\n", "\n".join(STEPS[:2]) + "\n", "\n".join(STEPS)]
    assert marks == [1.0, -1.0, 1.0]


def test_only_the_last_mark_is_learned_where_that_is_asked_for(encoder_with, sample):
    encoder = encoder_with("\n", True)
    texts, marks = read_up_to_marks(encoder, encoder.encode(sample))
    assert (len(texts), marks) == (1, [1.0])
    assert encoder.fingerprint != encoder_with("\n").fingerprint != encoder_with("\n\n").fingerprint


def test_a_rows_weight_multiplies_its_marks(encoder_with, sample):
    encoder = encoder_with()
    _texts, marks = read_up_to_marks(encoder, encoder.encode(dataclasses.replace(sample, weight=0.5)))
    assert marks == [0.5, -0.5, 0.5]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"steps": ()}, "rows.jsonl:3: the row: got no steps"),
        ({"steps": ("a", "b\nc", "d")}, "rows.jsonl:3: step 2: got the separator"),
        ({"steps": ("a", "see <image:1>", "d")}, "rows.jsonl:3: a step: got a box or an image in it"),
    ],
)
def test_a_row_without_steps_is_named(encoder_with, sample, changes, complaint):
    with pytest.raises(UseError, match=complaint):
        encoder_with().encode(dataclasses.replace(sample, **changes))


ROW = {"prompt": "what is 3 + 4?", "completions": ["3 and 4", "is 7"], "labels": [True, 0]}


def write(tmp_path, row):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return Rows.open([str(tmp_path / "rows.jsonl")])


@pytest.mark.parametrize("prompt", [ROW["prompt"], [{"role": "user", "content": ROW["prompt"]}]])
def test_trls_rows_are_read(tmp_path, prompt):
    sample = write(tmp_path, ROW | {"prompt": prompt})[0]
    assert (sample.steps, sample.step_labels) == (("3 and 4", "is 7"), (True, False))
    assert [turn.text for turn in sample.turns] == [ROW["prompt"], "3 and 4\nis 7"]


def test_rows_in_steps_are_written_as_they_were_read(tmp_path):
    sample = write(tmp_path, ROW)[0]
    write_rows([sample], tmp_path / "again.jsonl")
    (again,) = Rows.open([str(tmp_path / "again.jsonl")])
    assert dataclasses.replace(again, sample_id=sample.sample_id) == sample


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"labels": [True]}, r"`labels` \[True\]; expected 2 times true or false"),
        ({"labels": [True, 2]}, "expected 2 times true or false"),
        ({"completions": []}, "expected a list of steps"),
        ({"completions": ["a", " "]}, "expected a list of steps"),
    ],
)
def test_rows_that_are_none_of_these_are_named(tmp_path, changes, complaint):
    with pytest.raises(UseError, match=complaint):
        write(tmp_path, ROW | changes)[0]
