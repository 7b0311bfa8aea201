"""Rows that are too long: where they are cut, and what is said of it."""

import dataclasses

import numpy as np
import pytest

from megavlm.data.cut import exchange_ends
from megavlm.data.dataset import Dataset
from megavlm.data.encode import SampleEncoder, TooLong
from megavlm.data.images import read_image_spec
from megavlm.data.pixels import load_sample_patches
from megavlm.data.sample import Sample, Turn
from megavlm.data.token_weights import RESPONSE
from megavlm.data.tokens import Tokenizer
from megavlm.errors import UseError
from tests.unit.data.conftest import QWEN_INPUTS, draw_image


@pytest.fixture(scope="module")
def parts(qwen_dir):
    return read_image_spec(qwen_dir, QWEN_INPUTS), Tokenizer(qwen_dir, QWEN_INPUTS.image_token_id, template="chatml")


def encoder_of(parts, max_length, too_long):
    return SampleEncoder(QWEN_INPUTS, *parts, max_length, too_long=too_long)


@pytest.fixture
def row(tmp_path):
    images = tuple(str(draw_image(tmp_path / f"{number}.png", 64 + 32 * number, 64)) for number in range(3))
    turns = [Turn("system", "Be brief.")]
    for number in range(3):
        turns += [Turn("user", f"<image>question {number}?"), Turn("assistant", f"answer {number}: a red square")]
    return Sample("rows.jsonl:4", tuple(turns), images)


def lengths(parts, row):
    """Tokens up to the end of each exchange."""
    whole = encoder_of(parts, 10_000, "drop")
    return [
        len(whole.encode(dataclasses.replace(row, turns=row.turns[: 3 + 2 * n], images=row.images[: n + 1])).tokens_S)
        for n in range(3)
    ]


def test_exchanges_end_before_questions():
    roles = ["system", "user", "assistant", "user", "tool_call", "tool", "assistant", "user", "user", "tool_call"]
    assert exchange_ends([Turn(role, "x") for role in roles]) == [3, 7, 10]
    assert exchange_ends([Turn("user", "x"), Turn("assistant", "x"), Turn("user", "x")]) == [2]
    assert exchange_ends([Turn("user", "x")]) == []


def test_whole_exchanges_are_left_out_from_the_end(parts, row):
    ends = lengths(parts, row)
    whole = encoder_of(parts, ends[2], "cut_turns").encode(row)
    assert whole.cut == "" and len(whole.tokens_S) == ends[2]
    for max_length in range(ends[0], ends[2]):
        encoded = encoder_of(parts, max_length, "cut_turns").encode(row)
        num = sum(end <= max_length for end in ends)
        assert (encoded.cut, len(encoded.tokens_S), encoded.images) == ("turns", ends[num - 1], row.images[:num])
        assert encoded.tokens_S.tolist() == whole.tokens_S[: ends[num - 1]].tolist()
        assert np.array_equal(encoded.position_ids_3S, whole.position_ids_3S[:, : ends[num - 1]])
        assert encoded.grids_thw == whole.grids_thw[:num]
    for rule in ("cut_turns", "drop"):
        with pytest.raises(TooLong, match=rf"rows\.jsonl:4: {ends[2]} tokens"):
            encoder_of(parts, ends[0] - 1, rule).encode(row)
    with pytest.raises(UseError, match=rf"rows\.jsonl:4: the row: got {ends[2]} tokens; expected at most"):
        encoder_of(parts, ends[2] - 1, "stop").encode(row)


def test_an_answer_is_cut_where_the_limit_falls_into_it(parts, row):
    ends = lengths(parts, row)
    whole = encoder_of(parts, ends[2], "drop").encode(row)
    answers = np.flatnonzero(whole.token_classes_S >= RESPONSE)
    starts = [int(answers[0]), *(int(b) for a, b in zip(answers, answers[1:], strict=False) if b > a + 1)]
    seen = set()
    for max_length in range(starts[0], ends[2]):
        encoder = encoder_of(parts, max_length, "cut_answer")
        number = sum(start < max_length for start in starts) - 1  # of the answer that begins before the limit
        # The line break behind an answer's marker is not of it.
        in_answer = number >= 0 and max_length < ends[number] - 1
        if number < 0 or (number == 0 and not in_answer and max_length < ends[0]):
            with pytest.raises(TooLong):
                encoder.encode(row)
            continue
        encoded = encoder.encode(row)
        if in_answer:
            length, images = max_length, number + 1
        else:
            whole_ones = sum(end <= max_length for end in ends)
            length, images = ends[whole_ones - 1], whole_ones
        seen.add(encoded.cut)
        assert (encoded.cut, len(encoded.tokens_S)) == ("answer" if in_answer else "turns", length)
        assert encoded.tokens_S.tolist() == whole.tokens_S[:length].tolist()
        assert encoded.token_classes_S.tolist() == whole.token_classes_S[:length].tolist()
        assert np.array_equal(encoded.position_ids_3S, whole.position_ids_3S[:, :length])
        assert encoded.images == row.images[:images] and encoded.grids_thw == whole.grids_thw[:images]
        placeholders = int((encoded.tokens_S == QWEN_INPUTS.image_token_id).sum())
        assert placeholders == sum(QWEN_INPUTS.num_image_tokens(grid) for grid in encoded.grids_thw)
        load_sample_patches(encoded, encoder)
    assert seen == {"turns", "answer"}


def test_what_was_cut_and_dropped_is_reported(parts, row):
    ends = lengths(parts, row)
    long_answer = Sample("rows.jsonl:5", (Turn("user", "say"), Turn("assistant", "red " * 400)))
    short = Sample("rows.jsonl:6", (Turn("user", "hi"), Turn("assistant", "yes")))
    rows = [row, long_answer, short]
    for rule, kept, cut, dropped in (
        ("drop", [2], {}, {"too_long": ("rows.jsonl:4", "rows.jsonl:5")}),
        ("cut_turns", [0, 2], {"turns": (0,)}, {"too_long": ("rows.jsonl:5",)}),
        ("cut_answer", [0, 1, 2], {"turns": (0,), "answer": (1,)}, {}),
    ):
        dataset = Dataset(rows, encoder_of(parts, ends[1] + 1, rule))
        report = dataset.prepare()
        assert (report.cut, report.dropped, report.num_kept) == (cut, dropped, len(kept))
        assert [dataset.is_cut(index) for index in range(len(kept))] == [number != 2 for number in kept]
        assert [len(dataset.encoded(index).tokens_S) for index in range(len(kept))] == dataset.num_tokens_each.tolist()


def test_a_row_that_ends_with_a_question_loses_that_too(parts, row):
    ends = lengths(parts, row)
    asked = dataclasses.replace(row, turns=row.turns[:6], images=row.images)
    encoded = encoder_of(parts, ends[1], "cut_turns").encode(asked)
    assert (encoded.cut, len(encoded.tokens_S)) == ("turns", ends[1])
