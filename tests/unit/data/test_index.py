"""The index: the same by any number of builders, going on where it was, honest about mistakes."""

import json
import threading

import numpy as np
import pytest

from megavlm.data import index_files
from megavlm.data.dataset import Dataset
from megavlm.data.encode import SampleEncoder
from megavlm.data.images import read_image_spec
from megavlm.data.index_files import Builders, build_index, fingerprint, is_complete
from megavlm.data.rows import Rows
from megavlm.data.tokens import Tokenizer
from megavlm.errors import UseError
from tests.unit.data.conftest import QWEN_INPUTS, draw_image, write_jsonl

NUM_ROWS = 23


@pytest.fixture(scope="module")
def encoder(qwen_dir):
    return SampleEncoder(
        QWEN_INPUTS, read_image_spec(qwen_dir, QWEN_INPUTS), Tokenizer(qwen_dir, QWEN_INPUTS.image_token_id), 200
    )


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(index_files, "PART_ROWS", 4)


@pytest.fixture
def rows(tmp_path):
    """Rows with no, one or two images; row 7 (from 0) is too long, row 9 learns nothing."""
    rows = []
    for number in range(NUM_ROWS):
        names = [f"{number}_{which}.png" for which in range(number % 3)]
        for which, name in enumerate(names):
            draw_image(tmp_path / name, 40 + 16 * number, 48 + 30 * which, seed=number)
        answer = {"role": "assistant", "content": "red " * (500 if number == 7 else number) + "square"}
        if number == 9:
            answer["loss"] = False
        rows.append({"messages": [{"role": "user", "content": "<image>" * len(names) + "what?"}, answer],
                     "images": names})  # fmt: skip
    return Rows.open([str(write_jsonl(tmp_path / "rows.jsonl", rows))])


def same(left, right):
    assert left.num_rows == right.num_rows
    for name in ("kept_N", "num_tokens_N", "digests_N"):
        assert np.array_equal(vars(left)[name], vars(right)[name])
    assert list(left.grids) == list(right.grids)
    assert {reason: (list(rows.rows), rows.messages) for reason, rows in left.dropped.items()} == {
        reason: (list(rows.rows), rows.messages) for reason, rows in right.dropped.items()
    }


def test_it_says_what_encoding_says(rows, encoder, tmp_path):
    index = build_index(tmp_path / "index", rows, encoder)
    kept = [number for number in range(NUM_ROWS) if number not in (7, 9)]
    assert index.kept_N.tolist() == kept
    encoded = [encoder.encode(rows[number]) for number in kept]
    assert index.num_tokens_N.tolist() == [len(one.tokens_S) for one in encoded]
    assert list(index.grids) == [one.grids_thw for one in encoded]
    assert index.grids[-1] == encoded[-1].grids_thw and index.grids[:2] == [encoded[0].grids_thw, encoded[1].grids_thw]
    assert {reason: list(found.rows) for reason, found in index.dropped.items()} == {
        "too_long": [7],
        "nothing_to_learn": [9],
    }
    in_memory = Dataset(rows, encoder)
    in_memory.prepare()
    same(index, in_memory.index)


def test_any_number_of_builders_make_the_same(rows, encoder, tmp_path):
    alone = build_index(tmp_path / "alone", rows, encoder)
    barrier, found = threading.Barrier(3, timeout=60), {}

    def build(number):
        builders = Builders(number, 3, barrier.wait)
        found[number] = build_index(tmp_path / "together", rows, encoder, builders=builders)

    threads = [threading.Thread(target=build, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(3):
        same(found[number], alone)
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {
        path.name for path in (tmp_path / "together").iterdir()
    }


def test_an_interrupted_build_goes_on_where_it_was(rows, encoder, tmp_path):
    whole = build_index(tmp_path / "whole", rows, encoder)

    class Interrupted(SampleEncoder):
        calls = 0

        def encode(self, sample):
            Interrupted.calls += 1
            if Interrupted.calls == 10:
                raise KeyboardInterrupt
            return super().encode(sample)

    fragile = Interrupted(encoder.inputs, encoder.image_spec, encoder.tokenizer, encoder.max_length)
    with pytest.raises(KeyboardInterrupt):
        build_index(tmp_path / "index", rows, fragile)
    assert not is_complete(tmp_path / "index")
    same(build_index(tmp_path / "index", rows, fragile), whole)
    assert is_complete(tmp_path / "index")
    assert Interrupted.calls == 10 + NUM_ROWS - 8  # two parts of four rows were kept
    same(build_index(tmp_path / "index", rows, fragile), whole)
    assert Interrupted.calls == 10 + NUM_ROWS - 8


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_mistakes_stop_or_are_left_out_and_counted(rows, encoder, tmp_path):
    cut(tmp_path / "4_0.png")  # its header is whole
    (tmp_path / "13_0.png").write_bytes(b"no image")
    with pytest.raises(UseError, match=r"rows\.jsonl:14: .*13_0\.png: got unreadable image"):
        build_index(tmp_path / "stop", rows, encoder, stop_at_mistake=True)
    with pytest.raises(UseError, match=r"rows\.jsonl:5: .*4_0\.png: got unreadable image"):
        build_index(tmp_path / "stop_checked", rows, encoder, stop_at_mistake=True, check_images=True)
    index = build_index(tmp_path / "skip", rows, encoder, check_images=True)
    assert index.kept_N.tolist() == [number for number in range(NUM_ROWS) if number not in (4, 7, 9, 13)]
    assert index.num_mistakes == 2
    lines = (tmp_path / "skip" / "mistakes.txt").read_text().splitlines()
    assert lines == index.mistakes
    assert "rows.jsonl:5:" in lines[0] and "rows.jsonl:14:" in lines[1]
    facts = json.loads((tmp_path / "skip" / "index.json").read_text())
    assert facts["dropped"] == {"too_long": 1, "nothing_to_learn": 1, "unusable_row": 1, "broken_image": 1}
    # An index with mistakes in it is no index for a run that stops at them.
    with pytest.raises(UseError, match=r"rows\.jsonl:5:"):
        build_index(tmp_path / "skip", rows, encoder, check_images=True, stop_at_mistake=True)


def test_a_mended_mistake_is_looked_at_again(rows, encoder, tmp_path):
    whole = (tmp_path / "13_0.png").read_bytes()
    (tmp_path / "13_0.png").write_bytes(b"no image")
    with pytest.raises(UseError, match=r"rows\.jsonl:14:"):
        build_index(tmp_path / "index", rows, encoder, stop_at_mistake=True)
    assert not is_complete(tmp_path / "index")
    (tmp_path / "13_0.png").write_bytes(whole)
    assert len(build_index(tmp_path / "index", rows, encoder, stop_at_mistake=True).kept_N) == NUM_ROWS - 2


def test_fingerprint(rows, encoder, tmp_path):
    file = tmp_path / "rows.jsonl"
    first = fingerprint([file], encoder, "")
    assert fingerprint([file], encoder, "") == first
    others = {first, fingerprint([file], encoder, "images")}
    longer = SampleEncoder(encoder.inputs, encoder.image_spec, encoder.tokenizer, encoder.max_length + 1)
    others.add(fingerprint([file], longer, ""))
    file.write_text(file.read_text() + "\n")
    others.add(fingerprint([file], encoder, ""))
    assert len(others) == 4


def test_a_folder_that_cannot_be_written(rows, encoder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UseError, match=r"set data\.index_dir"):
        build_index(tmp_path / "file" / "index", rows, encoder)
