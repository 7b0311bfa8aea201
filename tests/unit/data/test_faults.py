"""Every kind of broken row and image, each one in a hundred: left out and counted exactly, or the first one named.

With MEGAVLM_FULL_MATRIX=1 it is 10,000 rows, else 1,500.
"""

import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from megavlm.data.dataset import Dataset
from megavlm.data.encode import SampleEncoder
from megavlm.data.images import read_image_spec
from megavlm.data.index_files import build_index
from megavlm.data.index_workers import build_index_with_processes
from megavlm.data.row_options import RowOptions
from megavlm.data.rows import Rows
from megavlm.data.tokens import Tokenizer
from megavlm.errors import UseError
from tests.unit.data.conftest import QWEN_INPUTS, draw_image

NUM_ROWS = 10_000 if os.environ.get("MEGAVLM_FULL_MATRIX") else 1_500


def conversation(question="<image>what?", answer="red square", images=("good.png",), **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": list(images), **more}


FAULTS = {
    "broken JSON": ("unreadable_row", '{"messages": [{"role": "user", '),
    "no object": ("unreadable_row", "[1, 2]"),
    "not UTF-8": ("unreadable_row", b'{"messages": "\xff\xfe"}'),
    "unknown keys": ("unreadable_row", {"prose": "hello"}),
    "longer than a row may be": ("unreadable_row", conversation(answer="red " * 20_000)),
    "missing image": ("unreadable_row", conversation(images=["nowhere.png"])),
    "image outside of the root": ("unreadable_row", conversation(images=["../outside.png"])),
    "symbolic link that leads out of the root": ("unreadable_row", conversation(images=["link.png"])),
    "URL": ("unreadable_row", conversation(images=["https://example.org/a.png"])),
    "data URI that is no image": ("unreadable_row", conversation(images=["data:text/plain;base64,aGVsbG8="])),
    "two images, one placeholder": ("unreadable_row", conversation(images=["good.png", "good.png"])),
    "two answers in turn": ("unreadable_row", {"messages": [{"role": "assistant", "content": "a"}] * 2}),
    "empty answer": ("unreadable_row", conversation(answer=" ")),
    "no answer": ("unreadable_row", {"messages": [{"role": "user", "content": "what?"}]}),
    "empty image": ("unusable_row", conversation(images=["empty.png"])),
    "text that is called an image": ("unusable_row", conversation(images=["text.jpg"])),
    "image with too many pixels": ("unusable_row", conversation(images=["bomb.png"])),
    "image of an impossible shape": ("unusable_row", conversation(images=["thread.png"])),
    "the model's own token in a text": ("unusable_row", conversation(question="<image>what is <|image_pad|>?")),
    "image cut behind its header": ("broken_image", conversation(images=["cut.png"])),
    "too long": ("too_long", conversation(answer="red " * 500)),
    "muted": ("nothing_to_learn", {"messages": [{"role": "user", "content": "hi"},
                                                {"role": "assistant", "content": "yes", "loss": False}]}),
}  # fmt: skip


@pytest.fixture(scope="module")
def encoder(qwen_dir):
    return SampleEncoder(
        QWEN_INPUTS, read_image_spec(qwen_dir, QWEN_INPUTS), Tokenizer(qwen_dir, QWEN_INPUTS.image_token_id), 200
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "root"
    folder.mkdir()
    draw_image(folder / "good.png", 64, 48)
    draw_image(folder.parent / "outside.png", 64, 48)
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("this is no image")
    whole = draw_image(folder / "whole.png", 80, 80).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    Image.new("RGB", (3000, 2)).save(folder / "thread.png")
    return folder


@pytest.fixture(scope="module")
def rows(pictures):
    """Faults at fixed places, each in one row of a hundred; the other rows are good and differ."""
    kinds = list(FAULTS)
    lines, expected, good = [], {}, []
    for number in range(NUM_ROWS):
        kind = kinds[number % 100] if number % 100 < len(kinds) else None
        reason, row = FAULTS[kind] if kind else ("", conversation(question=f"<image>what is {number}?"))
        line = row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
        lines.append(line + b"\n")
        if kind:
            expected.setdefault(reason, []).append(number)
        else:
            good.append(number)
    (pictures / "rows.jsonl").write_bytes(b"".join(lines))
    options = RowOptions(root=str(pictures), max_row_bytes=50_000)
    return Rows.open([str(pictures / "rows.jsonl")], options), expected, good


def test_bad_rows_are_left_out_and_counted_and_good_rows_keep_their_order(rows, encoder, tmp_path):
    samples, expected, good = rows
    assert len(samples) == NUM_ROWS
    index = build_index_with_processes(
        tmp_path / "index", samples, encoder, check_images=True, num_processes=2, progress=lambda _done, _all: None
    )
    assert index.kept_N.tolist() == good
    assert {reason: dropped.rows.tolist() for reason, dropped in index.dropped.items()} == expected
    assert index.num_mistakes == sum(len(numbers) for reason, numbers in expected.items()
                                     if reason not in ("too_long", "nothing_to_learn"))  # fmt: skip
    for line in index.mistakes:
        assert "\n" not in line and "; fix: " in line and re.search(r"rows\.jsonl(:| row )\d+", line), line
    dataset = Dataset(samples, encoder)
    dataset.adopt(index)
    some = np.linspace(0, len(good) - 1, 50).astype(int).tolist()
    assert [dataset.sample(at).turns[0].text for at in some] == [f"<image>what is {good[at]}?" for at in some]


@pytest.mark.parametrize("kind", FAULTS)
def test_alone_it_stops_the_run_with_one_line(pictures, encoder, tmp_path, kind):
    reason, row = FAULTS[kind]
    line = row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
    file = pictures / f"{list(FAULTS).index(kind)}.jsonl"
    good = json.dumps(conversation()).encode()
    file.write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    samples = Rows.open([str(file)], RowOptions(root=str(pictures), max_row_bytes=50_000))
    if reason in ("too_long", "nothing_to_learn"):  # no mistake
        index = build_index(tmp_path, samples, encoder, check_images=True, stop_at_mistake=True)
        assert index.kept_N.tolist() == [0, 2]
        return
    with pytest.raises(UseError) as error:
        build_index(tmp_path, samples, encoder, check_images=True, stop_at_mistake=True)
    text = str(error.value)
    assert "\n" not in text and re.search(rf"{file.name}(:| row )2\b", text), text
    assert list(tmp_path.glob("part_*")) == []
