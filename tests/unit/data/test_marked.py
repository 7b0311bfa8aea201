import dataclasses
import json

import pytest
import torch

from megavlm.data.encode import SampleEncoder
from megavlm.data.images import read_image_spec
from megavlm.data.marked import final_answer, with_other_answer
from megavlm.data.packing import pack, part_of
from megavlm.data.row_options import RowOptions
from megavlm.data.rows import Rows
from megavlm.data.sample import Sample, Turn
from megavlm.data.tokens import Tokenizer
from megavlm.errors import UseError
from tests.unit.data.conftest import QWEN_INPUTS, draw_image


@pytest.fixture(scope="module")
def encoders(qwen_dir):
    tokenizer = Tokenizer(qwen_dir, QWEN_INPUTS.image_token_id, QWEN_INPUTS.has_borders)
    spec = read_image_spec(qwen_dir, QWEN_INPUTS)
    return {
        kind: SampleEncoder(QWEN_INPUTS, spec, tokenizer, 512, row_kind=kind) for kind in ("conversation", "marked")
    }


@pytest.fixture
def sample(tmp_path):
    turns = (Turn("user", "<image>what is it?"), Turn("assistant", "a red square"))
    return Sample("rows.jsonl:3", turns, (str(draw_image(tmp_path / "a.png", 96, 64)),), label=False)


OTHER = (Turn("assistant", "the lazy dog over there, it is brown"),)


def write_rows(path, answers):
    lines = [
        {
            "messages": [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": text}],
            "label": True,
        }
        for n, text in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_marked_row_reads_the_answer_of_another_one_beside_its_own(encoders, sample):
    row = encoders["marked"].encode(with_other_answer(sample, OTHER))
    own = encoders["conversation"].encode(sample)
    other = encoders["conversation"].encode(dataclasses.replace(sample, turns=(sample.turns[0], *OTHER)))
    for part, alone in zip(row.parts, (own, other), strict=True):
        assert row.tokens_S[part].tolist() == alone.tokens_S.tolist()
        assert row.loss_weights_S()[part].tolist() == alone.loss_weights_S().tolist()
    assert (row.images, row.target) == (sample.images, 0.0)


def test_a_row_without_a_label_is_named(encoders, sample):
    unmarked = with_other_answer(dataclasses.replace(sample, label=None), OTHER)
    with pytest.raises(UseError, match="rows.jsonl:3: the row: got no label"):
        encoders["marked"].encode(unmarked)


def test_answers_come_from_half_the_rows_away_and_broken_ones_are_passed_by(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [f"answer {n}" for n in range(6)])
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    lines[4] = lines[4].replace('"role": "assistant"', '"role": "nobody"')
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    rows = Rows.open([path], RowOptions(other_answers=True))
    assert [rows[n].rejected_turns[-1].text for n in (0, 1, 2, 3, 5)] == [f"answer {n}" for n in (3, 5, 5, 0, 2)]
    assert [rows[n].rejected_turns[0].text for n in (0, 5)] == ["question 0", "question 5"]
    with pytest.raises(UseError, match="row 5"):
        rows[4]


def test_an_answer_that_shows_something_of_its_own_row_stays_there():
    assert final_answer(Sample("a", (Turn("user", "?"), Turn("assistant", "there: <bbox>")))) == ()
    answer = (Turn("tool_call", "{}"), Turn("assistant", "a"))
    assert final_answer(Sample("a", (Turn("user", "?"), *answer))) == answer


def test_no_row_with_an_answer_that_can_stand_elsewhere_is_an_error(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ["see <bbox>"] * 3)
    with pytest.raises(UseError, match="row 1: got none in 16 rows; expected other rows with answers of words alone"):
        Rows.open([path], RowOptions(other_answers=True))[0]


@pytest.mark.parametrize("part", [0, 1])
def test_a_part_of_a_packed_row_is_what_packing_it_alone_gives(encoders, sample, part):
    text_only = dataclasses.replace(sample, turns=(Turn("user", "what?"), sample.turns[1]), images=())
    samples = [with_other_answer(one, OTHER) for one in (sample, text_only, sample)]
    sizes = {"sample_multiple": 4, "total_multiple": 8, "pad_token_id": 0, "patch_channels": QWEN_INPUTS.patch_channels}
    whole = pack([encoders["marked"].encode(one) for one in samples], None, **sizes)
    cut = part_of(whole, part, QWEN_INPUTS.image_token_id, 8)
    turns = [one.turns if part == 0 else one.rejected_turns for one in samples]
    alone = [
        encoders["conversation"].encode(
            dataclasses.replace(sample, turns=one, images=sample.images if one[0].text.startswith("<image>") else ())
        )
        for one in turns
    ]
    expected = pack(alone, None, **sizes)
    for name in ("tokens_T", "labels_T", "loss_weights_T", "position_ids_3T", "cu_seqlens", "real_T", "grid_thw_N3"):
        assert torch.equal(vars(cut)[name], vars(expected)[name]), name
    assert (cut.num_real_tokens, cut.num_parts) == (expected.num_real_tokens, 1)
    assert cut.feature_rows_V.tolist() == list(range(len(cut.feature_rows_V)))
    assert len(cut.feature_rows_V) == int((cut.tokens_T == QWEN_INPUTS.image_token_id).sum())
