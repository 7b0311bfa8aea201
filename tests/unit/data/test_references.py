import base64
import zipfile

import fsspec
import pytest

from megavlm.data.images import read_image_size
from megavlm.data.media import open_media
from megavlm.data.references import References
from megavlm.data.row_options import RowOptions
from megavlm.data.sample import InlineBytes, ZipMember
from megavlm.errors import UseError
from tests.unit.data.conftest import draw_image


@pytest.fixture
def folder(tmp_path):
    """A data folder with pictures, an archive, a way out, and a secret beside it."""
    inside = tmp_path / "data"
    (inside / "sub").mkdir(parents=True)
    picture = draw_image(inside / "a.png", width=20, height=10)
    draw_image(inside / "sub" / "b.png", width=30, height=10)
    draw_image(tmp_path / "secret.png")
    (inside / "out").symlink_to(tmp_path)
    (inside / "link.png").symlink_to("sub/b.png")
    with zipfile.ZipFile(inside / "pictures.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(picture, "deep/a.png")
        archive.writestr("bomb.png", bytes(1_000_000))
    (inside / "out.zip").symlink_to(tmp_path / "outside.zip")
    (tmp_path / "outside.zip").write_bytes((inside / "pictures.zip").read_bytes())
    return inside


def resolve(folder, value, kind="image", **options):
    return References(str(folder / "rows.jsonl"), RowOptions(**options)).resolve(kind, value, "rows.jsonl row 1")


def png_uri(folder):
    return "data:image/png;base64," + base64.b64encode((folder / "a.png").read_bytes()).decode()


@pytest.mark.parametrize("root", [False, True])
def test_what_a_row_may_say(folder, root):
    options = {"root": str(folder)} if root else {}
    picture = (folder / "a.png").read_bytes()
    for value, width in {
        "a.png": 20,
        str(folder / "a.png"): 20,
        "sub/../a.png": 20,
        "link.png": 30,
        "pictures.zip/deep/a.png": 20,
        png_uri(folder): 20,
    }.items():
        assert read_image_size(resolve(folder, value, **options)) == (width, 10)
    assert resolve(folder, {"path": "a.png", "bytes": None}, **options) == str(folder / "a.png")
    assert resolve(folder, {"path": "x.png", "bytes": picture}, **options) == InlineBytes(picture, "x.png")
    assert resolve(folder, picture, **options) == InlineBytes(picture, "image in the row")
    assert resolve(folder, "pictures.zip/deep/a.png", **options) == ZipMember(f"{folder}/pictures.zip", "deep/a.png")


def test_relative_paths_start_at_image_dir(folder):
    assert resolve(folder, "b.png", image_dir=str(folder / "sub")) == str(folder / "sub" / "b.png")


def test_outside_is_allowed_without_a_root(folder):
    for value in ("../secret.png", "out/secret.png", str(folder.parent / "secret.png")):
        with open_media(resolve(folder, value)) as file:
            assert file.read(4) == b"\x89PNG"


@pytest.mark.parametrize(
    "value",
    ["../secret.png", "sub/../../secret.png", "out/secret.png", "/etc/passwd", "out.zip/deep/a.png", "../x.zip/a"],
)
def test_nothing_gets_out_of_the_root(folder, value):
    with pytest.raises(UseError, match=r"rows\.jsonl row 1: got the image .*; expected a file in data\.root"):
        resolve(folder, value, root=str(folder))


def test_a_folder_with_a_longer_name_is_not_the_root(folder):
    (folder.parent / "data2").mkdir()
    draw_image(folder.parent / "data2" / "a.png")
    with pytest.raises(UseError, match="expected a file in data.root"):
        resolve(folder, "../data2/a.png", root=str(folder))


REFUSED = {
    "nothing there": ("c.png", r"no image file .*c\.png"),
    "a folder": ("sub", "no image file"),
    "a zero byte": ("a.png\0.jpg", "expected a path"),
    "no member": ("pictures.zip/none.png", "no image .*pictures.zip:none.png"),
    "upwards in an archive": ("pictures.zip/deep/../deep/a.png", "a member's name without `..`"),
    "a bomb": ("pictures.zip/bomb.png", "of 1,000,000 bytes; expected at most data.max_member_bytes 100,000"),
    "an archive that is none": ("no.zip/a.png", "no image .*not a zip file"),
    "a number": (7, "a path, a URL, a data URI, or bytes"),
    "text as bytes": ({"bytes": "x"}, "a path, a URL, a data URI, or bytes"),
    "another object": ({"url": "x"}, "a path, a URL, a data URI, or bytes"),
    "remote": ("https://example.org/a.png", "data.allow_remote is false"),
    "remote in capitals": ("S3://bucket/a.png", "data.allow_remote is false"),
    "a local URL": ("file:///etc/passwd", "data.allow_remote is false"),
    "text in a data URI": ("data:text/plain;base64,eA==", "no image/... type"),
    "no type": ("data:;base64,eA==", "no image/... type"),
    "no base64": ("data:image/png,abc", "not base64"),
    "broken base64": ("data:image/png;base64,a$$b", r"the image data:image/png;base64,a\$\$b \("),
    "base64 of wrong length": ("data:image/png;base64,abc", "padding"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(folder, case):
    (folder / "no.zip").write_text("no archive")
    value, message = REFUSED[case]
    with pytest.raises(UseError, match=rf"rows\.jsonl row 1: got .*{message}") as caught:
        resolve(folder, value, max_member_bytes=100_000)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_data_uri_of_another_kind(folder):
    assert resolve(folder, "data:video/mp4;base64,eA==", kind="video").data == b"x"
    with pytest.raises(UseError, match="no video/... type"):
        resolve(folder, png_uri(folder), kind="video")


def test_a_data_uri_that_holds_no_image(folder):
    media = resolve(folder, "data:image/png;base64,eA==")
    with pytest.raises(UseError, match="data URI of type image/png: got unreadable image"):
        read_image_size(media)


def test_urls_where_they_are_allowed(folder):
    fsspec.filesystem("memory").pipe("/bucket/a.png", (folder / "a.png").read_bytes())
    media = resolve(folder, "memory://bucket/a.png", allow_remote=True, root=str(folder))
    assert media == "memory://bucket/a.png" and read_image_size(media) == (20, 10)
    with pytest.raises(UseError, match="memory://bucket/b.png: got unreadable image"):
        read_image_size(resolve(folder, "memory://bucket/b.png", allow_remote=True))


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "local:///etc/passwd", "simplecache::file:///etc/passwd", "zip://a::file:///x.zip", "://x",
     "reference://x", "git:///x", "s3://bucket/a::file:///etc/passwd", "FILE:///etc/passwd"],
)  # fmt: skip
def test_urls_do_not_reach_local_files(folder, url):
    with pytest.raises(UseError, match=r"rows\.jsonl row 1: got the image .*; expected a URL of s3"):
        resolve(folder, url, allow_remote=True)
    with pytest.raises(OSError, match="a URL of s3"):
        open_media(url)


def test_a_damaged_member(folder):
    path = folder / "pictures.zip"
    data = bytearray(path.read_bytes())
    data[60:120] = b"\xff" * 60
    path.write_bytes(data)
    with pytest.raises(OSError, match="pictures.zip:deep/a.png: "):
        open_media(resolve(folder, "pictures.zip/deep/a.png"))


def test_an_archive_that_lies_about_sizes(folder):
    """Its member says 10 bytes and unpacks to a million: no more than it says is unpacked, which is an error."""
    path = folder / "pictures.zip"
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")  # of the last member in the list of members
    data[entry + 24 : entry + 28] = (10).to_bytes(4, "little")
    path.write_bytes(data)
    media = resolve(folder, "pictures.zip/bomb.png", max_member_bytes=100)
    with pytest.raises(OSError, match="CRC"):
        open_media(media)
