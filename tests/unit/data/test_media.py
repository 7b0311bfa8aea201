"""Images that have no file of their own are still seen on pages."""

import os

from PIL import Image

from megavlm.data.media import shown_file
from megavlm.data.sample import FileRange, InlineBytes
from megavlm.observe.report_samples import embed_image
from tests.unit.data.conftest import draw_image


def test_a_file_stays_where_it_is(tmp_path):
    for name in ("data", "run"):
        (tmp_path / name).mkdir()
    picture = draw_image(tmp_path / "data" / "picture.png")
    assert shown_file(str(picture), tmp_path / "run", "0") == os.path.join("..", "data", "picture.png")
    assert not list((tmp_path / "run").iterdir())


def test_bytes_of_a_row_or_an_archive_are_written_beside_the_page(tmp_path):
    data = draw_image(tmp_path / "picture.png", 40, 30).read_bytes()
    (tmp_path / "shard.tar").write_bytes(b"x" * 512 + data + b"y" * 512)
    in_tar = FileRange(str(tmp_path / "shard.tar"), 512, len(data), "picture.png")
    for number, media in enumerate((InlineBytes(data, "a data URI"), in_tar)):
        name = shown_file(media, tmp_path / "run", f"sample_images/{number}_0")
        with Image.open(tmp_path / "run" / name) as image:
            assert image.size == (40, 30)
        assert not embed_image(tmp_path / "run" / name).problem
