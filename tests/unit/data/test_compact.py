"""What the index keeps of a row's tokens gives the row again, to the last bit, for every kind of row and family."""

import base64
import dataclasses
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megavlm.config.inputs import InputSpec
from megavlm.config.schema import TokenWeights
from megavlm.data import index_files
from megavlm.data.dataset import Dataset
from megavlm.data.encode import SampleEncoder, open_encoder
from megavlm.data.examine import digest
from megavlm.data.index_files import build_index
from megavlm.data.row_options import RowOptions
from megavlm.data.rows import Rows
from megavlm.data.sample import EncodedSample, VideoClip
from megavlm.data.token_weights import TokenSchedule
from megavlm.errors import UseError
from tests.tiny import write_tiny_llava, write_tiny_qwen3vl
from tests.tiny_anyres import ONEVISION_SIZES, write_tiny_llava_onevision
from tests.tiny_internvl import write_tiny_internvl
from tests.tiny_qwen2_5_vl import write_tiny_qwen2_5_vl
from tests.unit.data.conftest import LLAVA_INPUTS, QWEN_INPUTS, draw_image, write_jsonl
from tests.videos import write_video

STAMPED = dataclasses.replace(QWEN_INPUTS, video_kind="stamped", video_token_id=6, frame_border_ids=(3, 4))
TIMED = dataclasses.replace(QWEN_INPUTS, patch_px=14, video_kind="timed", video_token_id=6, tokens_per_second=4)
TILES = InputSpec(3, 512, "tiles", 7, 1, 2, 28, "linear", has_borders=True)
SIZES = tuple((height, width) for height, width in ONEVISION_SIZES)
POOLED = InputSpec(
    3, 512, "anyres", 7, 1, 1, 28, "linear", tile_sizes=SIZES, max_tile_area=2, tiles_alone=True,
    video_kind="pooled", video_token_id=4,
)  # fmt: skip
FAMILIES = {
    "dynamic, stamped": (write_tiny_qwen3vl, STAMPED),
    "dynamic, timed": (write_tiny_qwen2_5_vl, TIMED),
    "square": (write_tiny_llava, LLAVA_INPUTS),
    "tiles": (write_tiny_internvl, TILES),
    "anyres, pooled": (write_tiny_llava_onevision, POOLED),
}
CALL = '{"name": "zoom", "arguments": {"x": 1}}'


@dataclass(frozen=True)
class Family:
    hf_dir: Path
    inputs: InputSpec

    @property
    def template(self) -> str:
        """One that ends answers with a token that the tokenizer has; vicuna takes no tools."""
        return "vicuna" if self.inputs.image_kind == "square" else "chatml"

    def encoder(self, max_length: int = 4096, **options: Any) -> SampleEncoder:
        return open_encoder(self.hf_dir, self.inputs, max_length, template=self.template, **options)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Family:
    write, inputs = FAMILIES[request.param]
    return Family(write(tmp_path_factory.mktemp("model") / "hf"), inputs)


@pytest.fixture(scope="module")
def qwen(qwen_dir) -> Family:
    return Family(qwen_dir, STAMPED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures of different sizes and a video."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate([(96, 64), (40, 150), (70, 70)]):
        draw_image(folder / f"{number}.png", *size, seed=number)
    write_video(folder / "a.mp4", num_frames=40)
    pictures = [Image.open(folder / f"{number}.png").resize((96, 64)) for number in (0, 1, 2, 0)]
    pictures[0].save(folder / "move.gif", save_all=True, append_images=pictures[1:], duration=250)
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(index_files, "PART_ROWS", 3)


def talk(*turns, **more):
    """A row of questions and answers in turn; a dict is a whole message."""
    roles = ("user", "assistant")
    messages = [
        turn if isinstance(turn, dict) else {"role": roles[number % 2], "content": turn}
        for number, turn in enumerate(turns)
    ]
    return {"messages": messages, **more}


def rows_of_images(folder, *, with_tools=True):
    inline = "data:image/png;base64," + base64.b64encode((folder / "2.png").read_bytes()).decode()
    tool_row = talk(
        "<image>look",
        {"role": "tool_call", "content": CALL},
        {"role": "tool_response", "content": "a square"},
        {"role": "assistant", "content": "a red square"},
        images=["0.png"],
        tools=[{"name": "zoom", "description": "look closer"}],
    )
    return [
        talk("what?", "a red square"),
        talk("<image>what?", "a red square", images=["0.png"]),
        talk("<image><image>and <image>?", "two", images=["0.png", "1.png", "0.png"]),
        talk("<image>what?", "a", "and <image>?", "the dog", images=["1.png", inline]),
        talk("<image:2> or <image:1>?", "<image:2>, a square", images=["0.png", "1.png"]),
        talk("what is <image>?", "red", weight=0.5, images=["2.png"]),
        talk(
            "<image>?",
            {"role": "assistant", "content": "no", "loss": False},
            {"role": "user", "content": "<image> now?"},
            {"role": "assistant", "content": "yes", "loss_scale": 0.3},
            images=["2.png", "1.png"],
        ),
        talk(
            "<image>where is <ref-object>?",
            "<ref-object><bbox>",
            images=["0.png"],
            objects={"ref": ["the dog", "a dog"], "bbox": [[10, 20, 50, 60]]},
        ),
        *([tool_row] if with_tools else []),
    ]


def rows_of_videos():
    frames = [f"{number}.png" for number in (0, 0, 0)]
    return [
        talk("<video>what moves?", "a square", videos=["a.mp4"]),
        talk("<image><video> or <video>?", "the first", images=["1.png"], videos=["a.mp4", frames]),
        talk("<video>and?", "yes", "<image>now?", "no", images=["2.png"], videos=[frames]),
        talk("<image>or <video>?", "both", images=["move.gif"], videos=["move.gif"]),
    ]


def indexed(folder, encoder, rows, out, **options):
    """A data set with an index on the disk; the rows' own order stays."""
    number = len(list(folder.glob("*.jsonl")))
    samples = Rows.open([str(write_jsonl(folder / f"{number}.jsonl", rows))], RowOptions(**options))
    dataset = Dataset(samples, encoder)
    dataset.adopt(build_index(out / "index", samples, encoder, stop_at_mistake=True))
    return dataset


def assert_same(left, right):
    for field in dataclasses.fields(EncodedSample):
        one, other = getattr(left, field.name), getattr(right, field.name)
        assert type(one) is type(other), field.name
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype and one.shape == other.shape, field.name
            assert one.tobytes() == other.tobytes(), field.name
        else:
            assert one == other, field.name


def assert_rows_come_back(dataset):
    """In a process that got a copy, which never unpacks its tokenizer; returns the rows."""
    travelled = pickle.loads(pickle.dumps(dataset))
    found = [travelled.encoded(index) for index in range(len(travelled))]
    assert travelled.encoder.tokenizer._loaded is None
    for index, row in enumerate(found):
        assert_same(row, dataset.encoder.encode(dataset.sample(index)))
        assert digest(row) == dataset.index.digests_N[index]
    return found


def test_conversations(family, folder, tmp_path):
    rows = rows_of_images(folder, with_tools=family.template == "chatml")
    rows += rows_of_videos() if family.inputs.video_kind != "none" else []
    dataset = indexed(folder, family.encoder(box_format="json_1000"), rows, tmp_path)
    found = assert_rows_come_back(dataset)
    assert len(found) == len(rows)
    assert found[4].images == tuple(str(folder / name) for name in ("1.png", "0.png"))
    assert set(found[6].scales_S.tolist()) >= {0.0, np.float32(0.3)} and set(found[5].scales_S.tolist()) == {0.5}
    if family.inputs.video_kind == "timed":
        assert any(isinstance(image, VideoClip) and image.interval != 1 for row in found for image in row.images)


@pytest.mark.parametrize("rule", ["cut_turns", "cut_answer"])
def test_rows_that_are_cut(family, folder, tmp_path, rule):
    long = "a red square and the lazy dog over there, it is brown " * 3
    row = talk("<image>one?", long, "<image>two <image>?", long, images=["0.png", "1.png", "2.png"])
    lengths = indexed(folder, family.encoder(), [row], tmp_path / "whole").num_tokens_each
    seen = set()
    for max_length in range(int(lengths[0]), 40, -int(lengths[0] // 12)):
        encoder = family.encoder(max_length, too_long=rule)
        dataset = Dataset(Rows.open([str(write_jsonl(folder / "cut.jsonl", [row, talk("?", "yes")]))]), encoder)
        dataset.adopt(build_index(tmp_path / str(max_length), dataset.samples, encoder))
        seen |= {(row.cut, len(row.images)) for row in assert_rows_come_back(dataset)}
    (folder / "cut.jsonl").unlink()
    assert seen >= {("", 3), ("turns", 1)} | ({("answer", 3), ("answer", 1)} if rule == "cut_answer" else set())


def test_pairs(family, folder, tmp_path):
    rows = [
        talk("what?", "a", rejected_response="the lazy dog", margin=0.1),
        talk("<image>and <image>?", "a", rejected_response="no", images=["0.png", "1.png"]),
        talk("<image>and <image>?", "a", images=["0.png", "1.png"], rejected_images=["1.png", "2.png"], margin=2),
    ]
    if family.inputs.video_kind != "none":
        rows += [talk("<image>, <video>?", "a", rejected_response="no", images=["1.png"], videos=["a.mp4"])]
    found = assert_rows_come_back(indexed(folder, family.encoder(row_kind="pair"), rows, tmp_path))
    assert [row.target for row in found[:3]] == [0.1, 0, 2] and [len(row.images) for row in found[:3]] == [0, 2, 3]


def test_marked_answers(family, folder, tmp_path):
    rows = [
        talk("what?", "a", label=True),
        talk("<image>and <image>?", "b", label=False, images=["0.png", "1.png"]),
        talk("<image>?", "the dog", label=True, images=["2.png"]),
    ]
    dataset = indexed(folder, family.encoder(row_kind="marked"), rows, tmp_path, other_answers=True)
    assert [row.target for row in assert_rows_come_back(dataset)] == [1, 0, 1]


def test_images_and_their_text(family, folder, tmp_path):
    rows = [
        talk("<image>?", "the dog", images=["2.png"]),
        talk("<image>and <image> and <image>?", "b", images=["0.png", "1.png", "0.png"]),
    ]
    if family.inputs.video_kind != "none":
        rows += [talk("<image>, <video>?", "a", images=["1.png"], videos=["a.mp4"])]
    found = assert_rows_come_back(indexed(folder, family.encoder(row_kind="image_text"), rows, tmp_path))
    assert [len(row.images) for row in found[:2]] == [1, 2]


def test_kinds_of_tokens(qwen, folder, tmp_path):
    schedule = TokenSchedule(((0.0, TokenWeights(special=1, instruction=0.5, box=2)),))
    encoder = qwen.encoder(box_format="json_1000", schedule=schedule)
    found = assert_rows_come_back(indexed(folder, encoder, rows_of_images(folder), tmp_path))
    assert len(set(np.concatenate([row.token_classes_S for row in found]).tolist())) >= 5


def test_only_tokens_of_texts_take_room(qwen, folder, tmp_path):
    rows = [talk("<image>what?", "a", images=[f"{number}.png"]) for number in range(3)]
    dataset = indexed(folder, qwen.encoder(), rows, tmp_path)
    (tokens,) = (tmp_path / "index").glob("tokens_*")
    lengths = [int((row.tokens_S != QWEN_INPUTS.image_token_id).sum()) + 1 for row in map(dataset.encoded, range(3))]
    head = 52 + 4 + 4 + 4  # numbers of things; a run, an image, its frames
    assert tokens.stat().st_size == sum(5 * length + head for length in lengths)


def test_dropped_rows_leave_no_gap(qwen, folder, tmp_path):
    muted = talk("?", {"role": "assistant", "content": "no", "loss": False})
    rows = [muted, talk("one?", "1"), muted, muted, muted, muted, talk("two <image>?", "2", images=["0.png"]), muted,
            talk("three?", "3"), talk("four?", "4"), muted]  # fmt: skip
    dataset = indexed(folder, qwen.encoder(), rows, tmp_path)
    assert dataset.index.kept_N.tolist() == [1, 6, 8, 9]
    texts = [qwen.encoder().tokenizer.decode(row.tokens_S.tolist()) for row in assert_rows_come_back(dataset)]
    assert [text.split("user")[1].split()[0] for text in texts] == ["one?", "two", "three?", "four?"]


def test_files_that_were_cut_short_or_taken_away(qwen, folder, tmp_path):
    dataset = indexed(folder, qwen.encoder(), [talk("one?", "1"), talk("two?", "2")], tmp_path)
    (tokens,) = (tmp_path / "index").glob("tokens_*")
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-1])
    with pytest.raises(UseError, match=rf"tokens_0+\.bin: got {len(whole) - 1} bytes; expected {len(whole)}"):
        build_index(tmp_path / "index", dataset.samples, dataset.encoder)
    tokens.unlink()
    with pytest.raises(UseError, match="do not move or remove it during a run"):
        dataset.encoded(0)
    dataset.adopt(build_index(tmp_path / "index", dataset.samples, dataset.encoder))
    assert tokens.read_bytes() == whole
    assert_rows_come_back(dataset)


@pytest.mark.parametrize("images", [["0.png"], []])
def test_a_row_that_shows_less_than_before_is_named(qwen, folder, tmp_path, images):
    rows = [talk("<image>and <image>?", "a", images=["0.png", "1.png"])]
    path = write_jsonl(
        tmp_path / "rows.jsonl", [{**rows[0], "images": [str(folder / name) for name in ("0.png", "1.png")]}]
    )
    samples = Rows.open([str(path)])
    dataset = Dataset(samples, qwen.encoder())
    dataset.adopt(build_index(tmp_path / "index", samples, dataset.encoder))
    fewer = talk("<image>" * len(images) + "?", "a", images=[str(folder / name) for name in images])
    path.write_text(json.dumps(fewer).ljust(path.stat().st_size - 1) + "\n")
    with pytest.raises(UseError, match=rf"rows\.jsonl:1: got {len(images)} images and 0 videos; expected an image at"):
        dataset.encoded(0)
