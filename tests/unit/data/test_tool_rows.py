"""Rows in which tools are called, as ms-swift, LLaMA-Factory and OpenAI write them."""

import pytest

from megavlm.data.rows import Rows
from megavlm.errors import UseError
from tests.unit.data.conftest import write_jsonl

CALL = '{"name": "zoom", "arguments": {"x": 1}}'
QUESTION = {"role": "user", "content": "what?"}


def read(tmp_path, row):
    (sample,) = Rows.open([str(write_jsonl(tmp_path / "rows.jsonl", [row]))])
    return [(turn.role, turn.text) for turn in sample.turns], sample


def test_three_ways_to_write_a_call(tmp_path):
    swift = [QUESTION, {"role": "tool_call", "content": CALL, "loss": True}, {"role": "tool_response", "content": "a"},
             {"role": "assistant", "content": "b"}]  # fmt: skip
    factory = [{"from": "human", "value": "what?"}, {"from": "function_call", "value": CALL},
               {"from": "observation", "value": "a"}, {"from": "gpt", "value": "b"}]  # fmt: skip
    function = {"name": "zoom", "arguments": {"x": 1}}
    called = [{"type": "function", "function": function}]
    answer = {"role": "assistant", "content": None, "tool_calls": called}
    openai = [QUESTION, answer, {"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]
    expected = [("user", "what?"), ("tool_call", CALL), ("tool", "a"), ("assistant", "b")]
    for row in ({"messages": swift}, {"conversations": factory}, {"messages": openai}):
        assert read(tmp_path, row)[0] == expected
    turns, sample = read(tmp_path, {"messages": openai, "tools": [{"name": "zoom"}]})
    assert turns == expected and "zoom" in sample.tools


def test_an_answer_and_calls_in_one_entry(tmp_path):
    function = {"name": "zoom", "arguments": "{}"}
    answer = {"role": "assistant", "content": "I look.", "tool_calls": [{"function": function}] * 2, "loss_scale": 0.5}
    turns, sample = read(tmp_path, {"messages": [QUESTION, answer]})
    call = '{"name": "zoom", "arguments": "{}"}'
    assert turns == [("user", "what?"), ("assistant", "I look."), ("tool_call", call), ("tool_call", call)]
    assert [turn.loss_scale for turn in sample.turns] == [1.0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    "roles",
    [["tool_call"], ["user", "tool", "assistant"], ["user", "assistant", "tool"], ["user", "tool_call", "user"]],
)
def test_turns_in_no_order(tmp_path, roles):
    row = {"messages": [{"role": role, "content": CALL} for role in roles]}
    with pytest.raises(UseError, match="user and assistant in turn"):
        read(tmp_path, row)


def test_a_row_that_ends_with_what_a_tool_says(tmp_path):
    row = {"messages": [QUESTION, {"role": "tool_call", "content": CALL}, {"role": "tool", "content": "a"}]}
    with pytest.raises(UseError, match="a last turn by the assistant"):
        read(tmp_path, row)


def test_numbers_and_parts_with_images_do_not_mix(tmp_path):
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "<image:1>?"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]}
    with pytest.raises(UseError, match="images in parts beside <image:1>; expected all images in `images`"):
        read(tmp_path, row)
