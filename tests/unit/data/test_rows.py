import json

import pytest

from megavlm.data.row_options import RowOptions
from megavlm.data.rows import Rows
from megavlm.data.sample import Turn
from megavlm.errors import UseError
from tests.unit.data.conftest import draw_image, write_jsonl


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        draw_image(tmp_path / name)
    return tmp_path


def question(text="<image>\nWhat?"):
    return {"role": "user", "content": text}


ANSWER = {"role": "assistant", "content": "A cat."}
GOOD = {"messages": [question(), ANSWER], "images": ["a.png"]}


def read_rows(folder, rows, **kwargs):
    return read_files(write_jsonl(folder / "rows.jsonl", rows), **kwargs)


def read_files(*paths, **kwargs):
    return list(Rows.open([str(path) for path in paths], RowOptions(**kwargs)))


def test_llava_row(folder):
    row = {
        "id": "7",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
    }
    (sample,) = read_rows(folder, [row])
    assert sample.turns == (Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat."))
    assert sample.images == (str(folder / "a.png"),)
    assert sample.extra == {"id": "7"}
    assert sample.sample_id == f"{folder}/rows.jsonl:1"


def test_swift_row_keeps_loss_marks(folder):
    row = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            question("One <image> two <image>"),
            {"role": "assistant", "content": "Yes.", "loss": False},
            question("And?"),
            {"role": "assistant", "content": "No.", "loss_scale": 2},
        ],
        "images": ["b.png", str(folder / "a.png")],
        "solution": "x",
    }
    (sample,) = read_rows(folder, [row])
    assert [turn.role for turn in sample.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert [turn.loss for turn in sample.turns] == [None, None, False, None, None]
    assert [turn.loss_scale for turn in sample.turns] == [1.0, 1.0, 1.0, 1.0, 2.0]
    assert sample.images == (str(folder / "b.png"), str(folder / "a.png"))
    assert sample.extra == {"solution": "x"}


def test_content_parts_bring_images_or_take_the_rows(folder):
    parts = [
        {"type": "image"},
        {"type": "text", "text": "left, "},
        {"type": "image_url", "image_url": {"url": "b.png"}},
        {"text": " right?"},
    ]
    (sample,) = read_rows(folder, [{"messages": [question(parts), ANSWER], "images": "a.png"}])
    assert sample.turns[0].text == "<image>left, <image> right?"
    assert sample.images == (str(folder / "a.png"), str(folder / "b.png"))


def test_images_stand_in_the_order_of_the_text(folder):
    parts = [{"type": "image_url", "image_url": "b.png"}, {"type": "image"}, {"type": "image", "image": "b.png"}]
    (sample,) = read_rows(folder, [{"messages": [question(parts), ANSWER], "images": ["a.png"]}])
    assert [path[-5:] for path in sample.images] == ["b.png", "a.png", "b.png"]


def test_system_column_becomes_the_first_turn(folder):
    (sample,) = read_rows(folder, [{**GOOD, "system": "Be brief."}])
    assert sample.turns[0] == Turn("system", "Be brief.")
    assert "system" not in sample.extra


def test_image_dir_replaces_the_files_folder(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = write_jsonl(elsewhere / "rows.jsonl", [GOOD])
    (sample,) = read_files(path, image_dir=str(folder))
    assert sample.images == (str(folder / "a.png"),)
    with pytest.raises(UseError, match=r"rows\.jsonl row 1: got no image file .*elsewhere"):
        read_files(path)


def test_json_array_and_jsonl_give_the_same_rows(folder):
    rows = [GOOD, {"messages": [question("Hi"), ANSWER]}]
    (folder / "rows.json").write_text("\ufeff" + json.dumps(rows, indent=1) + "\n")
    from_array = read_files(folder / "rows.json")
    assert [(s.turns, s.images) for s in from_array] == [(s.turns, s.images) for s in read_rows(folder, rows)]
    assert from_array[1].sample_id.endswith("rows.json:2")


def test_a_bad_row_stops_nobody_else_and_lines_are_counted(folder):
    good = json.dumps(GOOD)
    (folder / "rows.jsonl").write_text(f"\ufeff{good}\n\n{good}\n{{broken\n \t\n{good}")
    rows = Rows.open([str(folder / "rows.jsonl")])
    # Blank lines count, as in an editor.
    assert [rows.sample_id(index).rpartition(":")[2] for index in range(len(rows))] == ["1", "3", "4", "6"]
    assert rows[0].turns == rows[1].turns == rows[3].turns == rows[-1].turns
    with pytest.raises(UseError, match=r"rows\.jsonl row 4: got broken JSON"):
        rows[2]
    with pytest.raises(IndexError):
        rows[4]


def test_question_only_rows_on_request(folder):
    rows = [{"messages": [question("Hi")]}]
    with pytest.raises(UseError, match=r"row 1: got no answer at the end"):
        read_rows(folder, rows)
    assert len(read_rows(folder, rows, require_answer=False)) == 1


def messages(*turns, **columns):
    return {"messages": list(turns), **columns}


BAD_ROWS = {
    "not an object": (["a", "list"], "got list; expected a JSON object"),
    "no turns": ({"images": ["a.png"]}, r"the keys \['images'\]; expected exactly one of `messages`"),
    "both spellings": (
        {**GOOD, "conversations": []},
        "which fit `messages` and `conversations`; expected exactly one of",
    ),
    "turns no list": ({"messages": "hi"}, "a list of turns"),
    "turn no object": (messages("hi"), r"messages\[0\] of type str"),
    "unknown role": (messages(question("hi"), {"role": "wizard", "content": "x"}), "by 'wizard'"),
    "no content": (messages({"role": "user"}, ANSWER), "content of type NoneType"),
    "too few images": ({**GOOD, "images": []}, "0 images and 1 <image> placeholders"),
    "too many images": ({**GOOD, "images": ["a.png", "b.png"]}, "2 images and 1 <image> placeholders"),
    "images, no placeholder": (messages(question("hi"), ANSWER, images=["a.png"]), "1 images and 0 <image>"),
    "images no paths": ({**GOOD, "images": [{"bytes": "x"}]}, "a path, a URL, a data URI, or bytes"),
    "missing image": ({**GOOD, "images": ["c.png"]}, r"no image file .*c\.png"),
    "image from the net": ({**GOOD, "images": ["https://x.org/a.png"]}, "data.allow_remote is false"),
    "no answer": (messages(question("hi")), "no answer at the end"),
    "no turns at all": (messages(), "no answer at the end"),
    "only a system turn": (messages({"role": "system", "content": "x"}), "no answer at the end"),
    "ends with a question": (messages(question("hi"), ANSWER, question("hi")), "no answer at the end"),
    "empty answer": (messages(question("hi"), {"role": "assistant", "content": " \n"}), r"empty answer messages\[1\]"),
    "answer first": (messages(ANSWER, question("hi"), ANSWER), "user and assistant in turn"),
    "two questions": (messages(question("hi"), question("hi"), ANSWER), "user and assistant in turn"),
    "system in the middle": (
        messages(question("hi"), {"role": "system", "content": "x"}),
        "user and assistant in turn",
    ),
    "image in the answer": (
        messages(question("hi"), {"role": "assistant", "content": "<image>"}, images=["a.png"]),
        "them in questions only",
    ),
    "unknown part": (messages(question([{"type": "audio", "audio": "x"}]), ANSWER), "parts of type text, image"),
    "loss no bool": (messages(question("hi"), {**ANSWER, "loss": 1}), "true or false"),
    "loss on a question": (messages({**question("hi"), "loss": True}, ANSWER), "loss on assistant turns only"),
    "negative loss scale": (messages(question("hi"), {**ANSWER, "loss_scale": -1}), "at least 0"),
    "NaN loss scale": (messages(question("hi"), {**ANSWER, "loss_scale": float("nan")}), "at least 0"),
    "audio": ({**GOOD, "audios": ["a.wav"]}, "remove `audios`"),
    "video without a place": ({**GOOD, "videos": ["v.mp4"]}, "1 videos and 0 <video> placeholders"),
    "no video file": (messages(question("<video>hi"), ANSWER, videos=["v.mp4"]), "no video file .*v.mp4"),
    "video in the answer": (
        messages(question("hi"), {"role": "assistant", "content": "<video>"}, videos=["a.png"]),
        "them in questions only",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_is_named(folder, case):
    row, message = BAD_ROWS[case]
    with pytest.raises(UseError, match=r"rows\.jsonl row 2: .*" + message):
        read_rows(folder, [GOOD, row])


BAD_FILES = {
    "rows.jsonl": [(b"", r"rows\.jsonl: got no rows"), (b'{"messages": "\xff"}', "row 1: got broken JSON")],
    "rows.json": [
        (b"[]", "got no rows"),
        (b'{"messages": []}', "a JSON array of rows"),
        (b"", "a JSON array of rows"),
        (b'[{"messages": [}]', "row 1: got broken JSON"),
        (b"\xff", "a JSON array of rows"),
    ],
    "rows.parquet": [(b"PAR1", r"rows\.parquet: got unreadable parquet")],
    "rows.csv": [(b"a,b", r"a name that ends in \.json, \.jsonl")],
    "rows.tar": [(b"text", "unreadable tar file"), (b"\x1f\x8b\x08", "a compressed tar file")],
    "rows.tar.gz": [(b"\x1f\x8b", "a compressed file")],
}


@pytest.mark.parametrize(("name", "content", "message"), [(n, c, m) for n, cs in BAD_FILES.items() for c, m in cs])
def test_bad_file(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(UseError, match=message):
        read_files(folder / name)


@pytest.mark.parametrize(
    ("behind", "message"),
    [
        ("", r"row 2: got broken JSON \(the file's end within it\)"),
        (" GOOD]", "row 2: got broken JSON"),
        (", ]", "row 3: got broken JSON"),
        ("}", "row 2: got broken JSON .*'}' where another bracket is open"),
        ("] x", "'x' behind the array"),
    ],
)
def test_json_array_that_is_cut_or_goes_on(folder, behind, message):
    good = json.dumps(GOOD)
    (folder / "rows.json").write_text(f"[{good}, {good}{behind.replace('GOOD', good)}")
    with pytest.raises(UseError, match=message):
        read_files(folder / "rows.json")


def test_missing_file(folder):
    with pytest.raises(UseError, match=r"none\.jsonl: got no such file"):
        read_files(folder / "none.jsonl")
