import dataclasses
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megavlm.data.inspect.rows import open_rows
from megavlm.data.inspect.write_rows import write_rows
from megavlm.data.sample import InlineBytes
from megavlm.errors import UseError
from tests.unit.data.inspect.conftest import chat

Write = Callable[[list[Any]], str]

USER = {"role": "user", "content": "<image>Which <ref-object> is at <bbox>?"}
ANSWER = {"role": "assistant", "content": "that", "loss_scale": 2.0}
ROWS: list[dict[str, Any]] = [
    chat("What?", "two", "0.png", task="count", solution="2"),
    {"messages": [{"role": "system", "content": "be brief"}, USER | {"content": "Hm?"}, ANSWER | {"loss": False}]},
    {"messages": [USER, ANSWER], "images": ["1.png"], "objects": {"ref": ["cup"], "bbox": [[1, 2, 30, 40]]}},
    chat("What?", "two", "0.png", rejected_response="three", margin=0.5),
    chat("What?", "two", "0.png", rejected_images=["1.png"]),
    chat("What?", "two", "0.png", label=False, channel="ocr", weight=0.5),
    {
        "conversations": [{"from": "human", "value": "<image>Q"}],
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
        "images": ["2.png"],
    },
    chat("What?", "two", "pictures.zip/inner/3.png"),
    {"messages": [{"role": "user", "content": "<video>What?"}, ANSWER], "videos": [["0.png", "1.png"]]},
    {
        "messages": [{"role": "user", "content": "Weather?"}, ANSWER],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
    },
]


@pytest.mark.parametrize("place", ["same.jsonl", "below/new.jsonl"])
def test_what_is_written_is_read_as_the_same(folder: Write, tmp_path: Path, place: str) -> None:
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        archive.write(tmp_path / "3.png", "inner/3.png")
    before = open_rows([folder(ROWS)])
    assert write_rows(before, tmp_path / place) == len(ROWS)
    for one, again in zip(before, open_rows([str(tmp_path / place)]), strict=True):
        assert dataclasses.replace(again, sample_id=one.sample_id) == one


def test_bytes_in_rows_stay_in_them(folder: Write, tmp_path: Path) -> None:
    (sample,) = open_rows([folder([chat("What?", "two", "0.png")])])
    data = (tmp_path / "0.png").read_bytes()
    inline = dataclasses.replace(sample, images=(InlineBytes(data, "cell"),))
    write_rows([inline], tmp_path / "new.jsonl", [{"image_text_score": 0.25}])
    (again,) = open_rows([str(tmp_path / "new.jsonl")])
    (image,) = again.images
    assert isinstance(image, InlineBytes) and image.data == data
    assert again.extra == {"image_text_score": 0.25}


def test_nothing_half_written_is_left(folder: Write, tmp_path: Path) -> None:
    out = tmp_path / "out" / "new.jsonl"
    samples = open_rows([folder([chat("What?"), {"messages": 3}])])
    with pytest.raises(UseError, match="row 2"):
        write_rows(samples, out)
    assert list(out.parent.iterdir()) == []
    bad = dataclasses.replace(samples[0], extra={"cell": b"bytes"})
    with pytest.raises(UseError, match=r"rows\.jsonl:1"):
        write_rows([bad], out)
    with pytest.raises(UseError, match=r"\.jsonl"):
        write_rows([samples[0]], tmp_path / "new.json")


def test_paths_are_seen_from_the_new_file(folder: Write, tmp_path: Path) -> None:
    samples = open_rows([folder([chat("What?", "two", "0.png")])])
    write_rows(samples, tmp_path / "new.jsonl")
    write_rows(samples, tmp_path / "below" / "new.jsonl")
    named = [json.loads((tmp_path / name).read_text())["images"] for name in ("new.jsonl", "below/new.jsonl")]
    assert named == [["0.png"], [str(tmp_path / "0.png")]]
