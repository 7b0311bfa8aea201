import io
import json
import multiprocessing
import pickle
import tarfile
import tempfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.data.images import read_image_size
from megavlm.data.media import open_media
from megavlm.data.row_options import RowOptions
from megavlm.data.rows import Rows
from megavlm.data.sample import FileRange, InlineBytes
from megavlm.data.sources import parquet
from megavlm.data.sources.json_array import JsonArrays
from megavlm.errors import UseError
from tests.unit.data.conftest import draw_image, write_jsonl

NUM_ROWS = 7


def chat(question, answer="A cat.", **columns):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **columns}


@pytest.fixture
def picture(tmp_path):
    return draw_image(tmp_path / "a.png", width=20, height=10).read_bytes()


def opened(path, **options):
    return Rows.open([str(path)], RowOptions(**options))


def questions(rows):
    return [sample.turns[0].text for sample in rows]


def write_parquet(path, picture, row_group_size=3):
    rows = [
        chat(f"<image>{number}", images=[{"bytes": picture, "path": f"{number}.png"}], solution=number)
        for number in range(NUM_ROWS)
    ]
    rows.append(chat("no image"))
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def test_parquet_rows_in_any_order(tmp_path, picture):
    rows = opened(write_parquet(tmp_path / "rows.parquet", picture))
    assert len(rows) == NUM_ROWS + 1
    for index in (5, 0, 6, 3, 2):
        assert rows[index].turns[0].text == f"<image>{index}"
        assert rows[index].sample_id == f"{tmp_path}/rows.parquet:{index + 1}"
        assert rows[index].images == (InlineBytes(picture, f"{index}.png"),)
        assert rows[index].extra == {"solution": index}
        assert read_image_size(rows[index].images[0]) == (20, 10)
    # Columns that are empty in this row are no columns of it.
    assert rows[NUM_ROWS].images == () and rows[NUM_ROWS].extra == {}


def test_parquet_keeps_few_row_groups(tmp_path, picture, monkeypatch):
    monkeypatch.setattr(parquet, "_KEPT_BYTES", 1)
    rows = opened(write_parquet(tmp_path / "rows.parquet", picture))
    kept = []
    for index in range(len(rows)):
        assert rows[index].turns[0].text
        kept.append([*rows._sources["parquet"]._files.get(rows.paths[0])._groups])
    assert kept == [[0], [0], [0], [1], [1], [1], [2], [2]]
    monkeypatch.setattr(parquet, "MAX_ROW_GROUP_BYTES", 100)
    with pytest.raises(UseError, match=r"row 1: got a row group of [\d,]+ bytes; expected at most 100"):
        opened(tmp_path / "rows.parquet")[0]


def test_parquet_that_is_damaged_inside(tmp_path, picture):
    path = write_parquet(tmp_path / "rows.parquet", picture)
    data = bytearray(path.read_bytes())
    data[4:40] = b"\xff" * 36
    path.write_bytes(data)
    rows = opened(path)
    with pytest.raises(UseError, match="rows.parquet row 1: got unreadable parquet"):
        rows[0]
    assert rows[NUM_ROWS].turns[0].text == "no image", "another row group"


def test_text_in_a_table_that_is_none(tmp_path):
    broken = pa.array([b"fine", b"\xff"], type=pa.binary()).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"txt": broken}), tmp_path / "rows.parquet")
    rows = opened(tmp_path / "rows.parquet")
    assert rows[0].turns[1].text == "fine"
    with pytest.raises(UseError, match="rows.parquet row 2: got unreadable columns"):
        rows[1]


def write_saved_dataset(folder, picture):
    """As `save_to_disk` does: two Arrow streams of some record batches, and the list of them."""
    folder.mkdir(parents=True)
    names = []
    for file in range(2):
        rows = [
            chat(f"<image>{number}", image={"bytes": picture, "path": None}) for number in range(file * 4, file * 4 + 4)
        ]
        table = pa.Table.from_pylist(rows)
        names.append(f"data-{file:05d}-of-00002.arrow")
        with pa.OSFile(str(folder / names[-1]), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_saved_dataset(tmp_path, picture):
    rows = opened(write_saved_dataset(tmp_path / "saved", picture))
    assert questions(rows) == [f"<image>{number}" for number in range(8)]
    assert rows[7].turns[0].text == "<image>7"
    assert rows.sample_id(5) == f"{tmp_path}/saved:6"
    assert open_media(rows[3].images[0]).read() == picture


def test_saved_dataset_of_splits_and_strange_ones(tmp_path, picture):
    write_saved_dataset(tmp_path / "saved" / "train", picture)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(UseError, match="several splits; expected one split; fix: .*saved/train"):
        opened(tmp_path / "saved")
    assert len(opened(tmp_path / "saved" / "train")) == 8
    state = tmp_path / "saved" / "train" / "state.json"
    for text, message in (
        ('{"_data_files": [{"filename": "../../secret.arrow"}]}', "the file name '../../secret.arrow'"),
        ('{"_data_files": [{"filename": "none.arrow"}]}', "none.arrow: got unreadable saved dataset"),
        ("{", "state.json: got unreadable saved dataset"),
    ):
        state.write_text(text)
        with pytest.raises(UseError, match=message):
            opened(tmp_path / "saved" / "train")


def write_tar(path, members, tar_format=tarfile.PAX_FORMAT):
    """Members as (name, bytes), or as a TarInfo."""
    with tarfile.open(path, "w", format=tar_format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return path


def as_json(row):
    return json.dumps(row).encode()


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tar_shard(tmp_path, picture, tar_format):
    folder = tarfile.TarInfo("shard")
    folder.type = tarfile.DIRTYPE
    long_name = "shard/" + "/".join(["folder" * 8] * 2)  # longer than a header has room for, but for USTAR
    members = [
        folder,
        ("shard/one.jpg", b"first"),
        ("shard/one.json", as_json(chat("<image>and<image>", source="web"))),
        ("shard/one.second.PNG", b"second!"),
        ("shard/two.json", as_json(chat("<image>?", images=["two.b.png"]))),
        ("shard/two.b.png", picture),
        ("shard/three.txt", "Zwei Kätzchen.\n".encode()),
        ("shard/three.webp", b"x"),
        (f"{long_name}/four.mp4", b"film"),
        (f"{long_name}/four.json", as_json(chat("<video>what?"))),
    ]
    path = write_tar(tmp_path / "rows.tar", members, tar_format)
    rows = opened(path, caption_prompt="What is it?")
    assert [rows.sample_id(index).rpartition(":")[2] for index in range(len(rows))] == ["1", "2", "3", "4"]
    four, three, two, one = (rows[index] for index in (3, 2, 1, 0))
    assert [open_media(image).read() for image in one.images] == [b"first", b"second!"]
    assert one.extra == {"source": "web", "__key__": "shard/one"}
    assert isinstance(one.images[0], FileRange) and one.images[0].path == str(path)
    assert read_image_size(two.images[0]) == (20, 10)
    assert [turn.text for turn in three.turns] == ["<image>\nWhat is it?", "Zwei Kätzchen."]
    assert open_media(four.videos[0]).read() == b"film" and four.images == ()


BAD_GROUPS = {
    "absolute": ([("/etc/one.json", as_json(chat("hi")))], "a member called '/etc/one.json'"),
    "upwards": ([("a/../../one.json", as_json(chat("hi")))], r"a member called 'a/../../one.json'"),
    "twice": ([("one.json", as_json(chat("hi")))] * 2, "two members called 'one.json'"),
    "no row": ([("one.png", b"x")], "the keys"),
    "unnamed picture": ([("one.json", as_json(chat("hi"))), ("one.png", b"x")], "1 images and 0 <image>"),
    "other picture": (
        [("one.json", as_json(chat("<image>", images=["/etc/passwd"]))), ("one.png", b"x")],
        r"'/etc/passwd' in the row; expected files of its group \(one.png\)",
    ),
    "broken row": ([("one.json", b"{")], "broken JSON"),
    "row of a list": ([("one.json", b"[1]")], "'one.json' with a list"),
    "no text": ([("one.txt", b"\xff")], "UTF-8 text"),
    "long row": ([("one.json", as_json(chat("h" * 5000)))], "at most data.max_row_bytes 2,000"),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_a_bad_group_of_a_shard_is_named_and_stops_no_other(tmp_path, case):
    members, message = BAD_GROUPS[case]
    good = ("good.json", as_json(chat("hi")))
    path = write_tar(tmp_path / "rows.tar", [("before.json", good[1]), *members, good])
    rows = opened(path, max_row_bytes=2000)
    assert questions([rows[0], rows[2]]) == ["hi", "hi"]
    with pytest.raises(UseError, match=f"rows.tar row 2: got .*{message}|rows.tar row 2: .*{message}"):
        rows[1]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_in_shards_are_refused(tmp_path, kind):
    link = tarfile.TarInfo("one.png")
    link.type, link.linkname = kind, "/etc/passwd"
    path = write_tar(tmp_path / "rows.tar", [("one.json", as_json(chat("<image>"))), link])
    with pytest.raises(UseError, match="row 1: got 'one.png', a link or special file"):
        opened(path)[0]


def test_a_damaged_shard_is_not_taken_for_a_short_one(tmp_path, picture):
    members = [(f"{name}.json", as_json(chat(name))) for name in "abc"]
    path = write_tar(tmp_path / "rows.tar", members)
    whole = path.read_bytes()
    assert len(opened(path)) == 3
    path.write_bytes(whole[:1024] + b"\xff" * 512 + whole[1536:])  # the second member's header
    with pytest.raises(UseError, match="rows.tar: got an unreadable tar file .*damaged header at byte 1024"):
        opened(path)
    path.write_bytes(whole[:1600])  # ends within the second member
    with pytest.raises(UseError, match="rows.tar: got an unreadable tar file .*unexpected end"):
        opened(path)


def test_folders_and_patterns(tmp_path, picture):
    for name in ("b", "a", "c"):
        write_jsonl(tmp_path / f"{name}.jsonl", [chat(name)])
    (tmp_path / "notes.txt").write_text("no rows")
    assert questions(opened(tmp_path)) == ["a", "b", "c"]
    assert questions(opened(tmp_path / "[bc].jsonl")) == ["b", "c"]
    assert questions(Rows.open([str(tmp_path / name) for name in ("c.jsonl", "a*")][:1])) == ["c"]
    write_jsonl(tmp_path / "[x].jsonl", [chat("brackets")])
    assert questions(opened(tmp_path / "[x].jsonl")) == ["brackets"], "a name that is there is no pattern"
    (tmp_path / "empty").mkdir()
    for names, message in (("empty", "a folder without files of rows"), ("z*.tar", "no such file")):
        with pytest.raises(UseError, match=message):
            opened(tmp_path / names)


def mixed(folder, picture):
    """Rows of every kind of file."""
    paths = [
        write_jsonl(folder / "rows.jsonl", [chat("jsonl")] * 2),
        folder / "rows.json",
        write_parquet(folder / "rows.parquet", picture),
        write_saved_dataset(folder / "saved", picture),
        write_tar(folder / "rows.tar", [("a.json", as_json(chat("tar")))]),
    ]
    paths[1].write_text(json.dumps([chat("json")]))
    return Rows.open([str(path) for path in paths])


def read_in_child(rows, connection):
    connection.send(questions(rows))


def test_rows_travel_to_data_workers(tmp_path, picture):
    rows = mixed(tmp_path, picture)
    expected = questions(rows)  # all files are open here
    assert len(expected) == 2 + 1 + NUM_ROWS + 1 + 8 + 1
    assert questions(pickle.loads(pickle.dumps(rows))) == expected, "as to a worker that is spawned"
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=read_in_child, args=(rows, there))
    child.start()
    try:
        assert here.poll(60) and here.recv() == expected
        assert questions(rows) == expected, "the child has moved no position here"
    finally:
        child.join()


def test_a_row_costs_a_few_bytes(tmp_path):
    one, many = (opened(write_jsonl(tmp_path / f"{count}.jsonl", [chat("hi")] * count)) for count in (1, 5001))
    assert (len(pickle.dumps(many)) - len(pickle.dumps(one))) / 5000 < 32


def test_a_file_that_went_away(tmp_path):
    rows = opened(write_jsonl(tmp_path / "rows.jsonl", [chat("hi")]))
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(UseError, match="rows.jsonl row 1: got an unreadable file"):
        rows[0]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(VALUES), indent=st.sampled_from([None, 0, 2]), ascii_only=st.booleans())
def test_elements_of_an_array_are_where_the_scan_says(rows, indent, ascii_only):
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        file.write(json.dumps(rows, indent=indent, ensure_ascii=ascii_only))
        file.flush()
        check_array(file.name, rows)


def check_array(path, rows):
    source = JsonArrays(10**6)
    found = list(source.scan(path))
    assert [number for number, _ in found] == list(range(1, len(rows) + 1))
    assert [source.read(path, position, "row") for _, position in found] == rows


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_rows_that_are_too_long_or_too_deep(tmp_path, ending):
    good = json.dumps(chat("hi"))
    deep = json.dumps(chat("hi"))[:-1] + ', "x": ' + "[" * 100 + "]" * 100 + "}"
    abyss = "[" * 100_000 + "]" * 100_000
    rows = [good, json.dumps(chat("h" * 300_000)), deep, abyss, good]
    path = tmp_path / f"rows.{ending}"
    path.write_text("\n".join(rows) if ending == "jsonl" else f"[{','.join(rows)}]")
    read = opened(path, max_row_bytes=250_000)
    assert questions([read[0], read[4]]) == ["hi", "hi"]
    for index, message in (
        (1, "row 2: got a row of 300"),
        (2, "row 3: got JSON with more"),
        (3, "row 4: got JSON with"),
    ):
        with pytest.raises(UseError, match=message):
            read[index]
