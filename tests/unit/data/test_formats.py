"""Rows as their users write them, format by format."""

import json

import pytest

from megavlm.data.messages import spoken
from megavlm.data.numbered_images import show_numbered
from megavlm.data.row_options import RowOptions
from megavlm.data.rows import Rows
from megavlm.data.sample import Box, FrameFiles, Turn
from megavlm.errors import UseError
from tests.unit.data.conftest import draw_image, write_jsonl


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        draw_image(tmp_path / name)
    return tmp_path


def read(folder, *rows, **options):
    samples = list(Rows.open([str(write_jsonl(folder / "rows.jsonl", list(rows)))], RowOptions(**options)))
    return samples[0] if len(samples) == 1 else samples


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **marks):
    return {"role": "assistant", "content": text, **marks}


def turns(*texts):
    return tuple(Turn(("user", "assistant")[number % 2], text) for number, text in enumerate(texts))


ASKED = [user("<image>What?")]
CHAT = {"messages": [*ASKED, assistant("A cat.")], "images": ["a.png"]}


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        {"conversation": [{"human": "Hi", "assistant": "Ho"}]},
        {"messages": [{"role": "human", "content": "Hi"}, {"from": "bot", "value": "Ho"}]},
        {"messages": [user([{"type": "text", "text": "Hi", "image": None}]), assistant("Ho", loss_scale=None)]},
        {"problem": "Hi", "solution": "Ho"},
        {"txt": "Ho"},
    ],
)
def test_one_question_in_many_spellings(folder, row):
    assert read(folder, row, caption_prompt="Hi").turns == turns("Hi", "Ho")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One <image> two <image>\nthree.", turns("One <image> two <image>", "\nthree.")),
        ("<image><image> both", turns("<image><image>", " both")),
    ],
)
def test_a_document_ends_with_what_stands_behind_its_last_image(folder, text, expected):
    sample = read(folder, {"text": text, "images": ["a.png", "b.png"], "source": "web"})
    assert sample.turns == expected and sample.extra == {"source": "web"}
    assert [str(image).rpartition("/")[2] for image in sample.images] == ["a.png", "b.png"]


def test_a_document_may_be_words_alone_and_other_rows_may_have_a_text(folder):
    assert read(folder, {"text": "only words"}).turns == turns("", "only words")
    assert read(folder, {**CHAT, "text": "beside"}).extra == {"text": "beside"}


def test_a_file_may_mix_formats(folder):
    samples = read(folder, CHAT, {"problem": "1+1?", "answer": "2"}, {"prompt": "p", "chosen": "c", "rejected": "r"})
    assert [sample.turns[-1].text for sample in samples] == ["A cat.", "2", "c"]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("A dog.", turns("<image>What?", "A dog.")),
        ([assistant("A dog.")], turns("<image>What?", "A dog.")),
        ([assistant("A"), user("dog?"), assistant("Yes.")], turns("<image>What?", "A", "dog?", "Yes.")),
    ],
)
def test_swift_rejected_response(folder, response, expected):
    sample = read(folder, {**CHAT, "rejected_response": response, "margin": 2})
    assert sample.turns == turns("<image>What?", "A cat.")
    assert sample.rejected_turns == expected
    assert (sample.margin, sample.rejected_images) == (2.0, None)
    assert sample.extra == {}


def test_swift_rejected_response_takes_the_last_answers_place(folder):
    talk = [user("Hi"), assistant("Ho"), user("And?"), assistant("Nothing.")]
    sample = read(folder, {"messages": talk, "rejected_response": "Go away.", "system": "Be kind."})
    assert sample.rejected_turns == (Turn("system", "Be kind."), *turns("Hi", "Ho", "And?", "Go away."))
    assert sample.rejected_turns[:-1] == sample.turns[:-1]


def test_swift_rejected_messages_and_images(folder):
    other = [user("<image>Who?"), assistant("A dog.")]
    sample = read(folder, {**CHAT, "rejected_messages": other, "rejected_images": ["b.png"]})
    assert sample.rejected_turns == turns("<image>Who?", "A dog.")
    assert sample.rejected_images == (str(folder / "b.png"),)
    sample = read(folder, {**CHAT, "rejected_messages": other})
    assert sample.rejected_images is None, "the same"
    two = [user([{"type": "image", "image": "b.png"}, {"type": "text", "text": "?"}]), assistant("No.")]
    assert read(
        folder, {**CHAT, "images": ["a.png"], "rejected_messages": two, "rejected_images": []}
    ).rejected_images == (str(folder / "b.png"),)


def test_swift_rejected_images_alone(folder):
    sample = read(folder, {**CHAT, "rejected_images": ["b.png"]})
    assert (sample.rejected_turns, sample.rejected_images) == ((), (str(folder / "b.png"),))


def test_llama_factory_preferences(folder):
    row = {
        "conversations": [{"from": "human", "value": "<image>What?"}],
        "chosen": {"from": "gpt", "value": "A cat."},
        "rejected": {"from": "gpt", "value": "A dog."},
        "images": ["a.png"],
    }
    sample = read(folder, row)
    assert (sample.turns, sample.rejected_turns) == (turns("<image>What?", "A cat."), turns("<image>What?", "A dog."))


@pytest.mark.parametrize("as_turns", [False, True])
def test_plain_preferences(folder, as_turns):
    row = {"prompt": "<image>What?", "chosen": "A cat.", "rejected": "A dog.", "images": ["a.png"], "margin": 0.5}
    if as_turns:
        row |= {"prompt": ASKED, "chosen": [assistant("A cat.")], "rejected": [assistant("A dog.")]}
    sample = read(folder, {**row, "source": "web"})
    assert (sample.turns, sample.rejected_turns) == (turns("<image>What?", "A cat."), turns("<image>What?", "A dog."))
    assert (sample.margin, sample.images, sample.extra) == (0.5, (str(folder / "a.png"),), {"source": "web"})


def test_reward_rows_keep_what_rewards_need(folder):
    row = {"problem": "<image>How many?", "answer": "7", "images": ["a.png"], "difficulty": 3}
    asked = read(folder, row, require_answer=False)
    assert (asked.turns, asked.extra) == (turns("<image>How many?"), {"answer": "7", "difficulty": 3})
    assert read(folder, row).turns == turns("<image>How many?", "7")
    sample = read(folder, {"messages": ASKED, "images": ["a.png"], "solution": "x"}, require_answer=False)
    assert (sample.turns, sample.extra) == (turns("<image>What?"), {"solution": "x"})


def test_labels_tools_channel_and_weight(folder):
    tool = {"type": "function", "function": {"name": "f"}}
    sample = read(folder, {**CHAT, "label": False, "channel": "ocr", "weight": 0.5, "tools": [tool]})
    assert (sample.label, sample.channel, sample.weight, sample.extra) == (False, "ocr", 0.5, {})
    for tools in (json.dumps([tool]), [json.dumps(tool)]):
        assert json.loads(read(folder, {**CHAT, "tools": tools}).tools) == [tool]
    assert read(folder, {**CHAT, "label": "cat"}).extra == {"label": "cat"}, "a class, not a verdict"


CALL = {"name": "look", "arguments": {"at": "cat"}}


@pytest.mark.parametrize(
    "calls",
    [
        [{"role": "tool_call", "content": json.dumps(CALL)}, {"role": "tool_response", "content": "black"}],
        [{"role": "tool_call", "content": CALL}, {"role": "tool", "content": "black"}],
        [{"from": "function_call", "value": json.dumps(CALL)}, {"from": "observation", "value": "black"}],
        [
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
            {"role": "tool", "content": "black"},
        ],
    ],
)
def test_calls_of_tools(folder, calls):
    sample = read(folder, {"messages": [user("Which colour?"), *calls, assistant("Black.")]})
    assert [turn.role for turn in sample.turns] == ["user", "tool_call", "tool", "assistant"]
    (message,) = [one for one in spoken(sample.turns, False) if one.calls]
    assert message.calls == (CALL,)
    assert sample.turns[2].text == "black"


def test_images_by_number(folder):
    talk = [user("Like <image:2> or <image:1>?"), assistant("<image:2>")]
    sample = read(folder, {"messages": talk, "images": ["a.png", "b.png"]})
    assert [path[-5:] for path in sample.images] == ["a.png", "b.png"]
    shown = show_numbered(sample)
    assert [path[-5:] for path in shown.images] == ["b.png", "a.png"]
    assert [turn.text for turn in shown.turns] == ["Like Picture 2: <image> or Picture 1: <image>?", "Picture 2"]


def test_objects(folder):
    row = {
        "messages": [user("<image><image>Find <ref-object>."), assistant("<bbox> and <bbox>, <ref-object>")],
        "images": ["a.png", "b.png"],
        "objects": {"ref": ["cats", "both"], "bbox": [[1, 2, 3.5, 4], [5, 6]], "image_id": [1]},
    }
    sample = read(folder, row)
    assert sample.boxes == (Box("cats", (1, 2, 3.5, 4), "real", 1), Box("both", (5, 6), "real", 0))
    assert sample.turns[1].text == "<bbox> and <bbox>, <ref-object>"
    row["messages"][0] = user("<image><image>Find it: <ref-object>, <ref-object>")
    row["objects"] = {"ref": ["a", "b", "c"], "bbox": [[0.1, 0, 0.2, 1]] * 2, "bbox_type": "norm1"}
    corners = [box.corners for box in read(folder, row).boxes]
    assert corners == [(0.1, 0, 0.2, 1)] * 2 + [()], "more names than boxes"


def test_a_video_may_be_a_list_of_frames(folder):
    frames = ["a.png", "b.png"]
    row = {"messages": [user("<video>?"), assistant("x")], "videos": [frames]}
    files = tuple(str(folder / name) for name in frames)
    assert read(folder, row).videos == (FrameFiles(files, 2.0),)
    assert read(folder, row, frames_fps=5).videos == (FrameFiles(files, 5),)
    part = {"type": "video", "video": frames, "sample_fps": 4}
    assert read(folder, {"messages": [user([part]), assistant("x")]}).videos == (FrameFiles(files, 4.0),)


BOXED = [user("<image>?"), assistant("<bbox>")]


def boxed(**objects):
    return {"messages": BOXED, "images": ["a.png"], "objects": objects}


BAD_ROWS = {
    "two formats": ({**CHAT, "problem": "x", "answer": "y"}, "which fit `messages` and `problem` and `answer`"),
    "no format": ({"question": "x"}, r"the keys \['question'\]; expected exactly one of"),
    "half a preference": ({"prompt": "x", "chosen": "y"}, "expected exactly one of"),
    "no rejected answer": (
        {"conversations": [{"from": "human", "value": "x"}], "chosen": {"from": "gpt", "value": "y"}},
        r"rejected\[0\] of type NoneType",
    ),
    "chosen by the user": (
        {"conversations": [{"from": "human", "value": "x"}], "chosen": {"from": "human", "value": "y"}, "rejected": {}},
        "`chosen` by user",
    ),
    "two rejected": ({**CHAT, "rejected_response": "x", "rejected_messages": []}, "expected one of them"),
    "rejected number": ({**CHAT, "rejected_response": 7}, "a text, or a list of turns"),
    "rejected is chosen": ({**CHAT, "rejected_response": "A cat."}, "the same answer as chosen and rejected"),
    "rejected ends with a question": ({**CHAT, "rejected_messages": ASKED}, "no answer at the end"),
    "rejected without images": ({**CHAT, "rejected_images": []}, "0 images and 1 <image>"),
    "rejected images missing": ({**CHAT, "rejected_images": ["c.png"]}, "no image file"),
    "rejected tools": ({**CHAT, "rejected_response": "x", "rejected_tools": ["x"]}, "remove `rejected_tools`"),
    "margin no number": ({**CHAT, "rejected_response": "x", "margin": "large"}, "`margin` 'large'"),
    "weight below 0": ({**CHAT, "weight": -1}, "`weight` '-1'"),
    "channel no text": ({**CHAT, "channel": 7}, "`channel` of type int"),
    "tools no JSON": ({**CHAT, "tools": "call me"}, "`tools` that are no JSON"),
    "tools no functions": ({**CHAT, "tools": "[7]"}, "a list of functions, each a JSON object"),
    "system no text": ({**CHAT, "system": ["x"]}, "`system` of type list"),
    "two image columns": ({**CHAT, "image": "a.png"}, "exactly one of `images` or `image`"),
    "template arguments": ({**CHAT, "chat_template_kwargs": {"max_pixels": 7}}, "remove `chat_template_kwargs`"),
    "too few boxes": (boxed(bbox=[]), "0 objects.bbox and 1 <bbox>"),
    "names without a place": (boxed(ref=["x"], bbox=[[1, 2, 3, 4]]), "1 objects.ref and 0 <ref-object>"),
    "box of three": (boxed(bbox=[[1, 2, 3]]), r"the box \[1, 2, 3\]"),
    "box the wrong way": (boxed(bbox=[[5, 2, 3, 4]]), "x1 <= x2"),
    "box beyond 1": (boxed(bbox=[[0, 0, 1, 2]], bbox_type="norm1"), "each from 0 to 1"),
    "unknown unit": (boxed(bbox=[[1, 2, 3, 4]], bbox_type="norm1000"), "real .* or norm1"),
    "box in another image": (boxed(bbox=[[1, 2, 3, 4]], image_id=[1]), "numbers of the row's images"),
    "box in no image": ({"messages": [user("<bbox>"), assistant("x")], "objects": {"bbox": [[1, 2]]}}, "without an"),
    "objects as a list": ({**CHAT, "objects": [1]}, "`objects`"),
    "video of no frames": ({"messages": [user("<video>"), assistant("x")], "videos": [[]]}, "a video of no frames"),
    "frames without brackets": (
        {"messages": [user("<video>"), assistant("x")], "videos": ["a.png", "b.png"]},
        r"the frames of one as \[\[\.\.\.\]\]",
    ),
    "caption of nothing": ({"txt": " "}, "the empty answer"),
    "document of nothing": ({"text": " "}, "an empty `text`"),
    "document that ends with an image": ({"text": "a <image> ", "images": ["a.png"]}, "no word behind the last image"),
    "document no text": ({"text": ["a"]}, "`text` of type list"),
    "document with too few images": ({"text": "a <image><image> b", "images": ["a.png"]}, "placeholder"),
    "tool without a call": (
        {"messages": [user("x"), {"role": "tool", "content": "y"}, assistant("z")]},
        "turns by user, tool, assistant",
    ),
    "call without an answer": (
        {"messages": [user("x"), {"role": "tool_call", "content": "{}"}, assistant("z")]},
        "turns by user, tool_call, assistant",
    ),
    "numbers beside parts": (
        {"messages": [user([{"image": "a.png"}, {"text": "<image:1>"}]), assistant("x")]},
        "all images in `images`",
    ),
    "answer no text": ({"problem": "1+1?", "answer": 2}, "content of type int"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_is_named(folder, case):
    row, message = BAD_ROWS[case]
    with pytest.raises(UseError, match=rf"rows\.jsonl row 2: .*{message}") as caught:
        read(folder, CHAT, row)
    assert "\n" not in str(caught.value)
