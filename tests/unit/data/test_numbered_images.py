import pytest

from megavlm.data.encode import SampleEncoder
from megavlm.data.images import read_image_spec
from megavlm.data.numbered_images import show_numbered
from megavlm.data.rows import Rows
from megavlm.data.sample import Sample, Turn
from megavlm.data.tokens import Tokenizer
from megavlm.errors import UseError
from tests.unit.data.conftest import QWEN_INPUTS, draw_image, write_jsonl


def sample(*texts, num_images=2):
    roles = ("user", "assistant")
    turns = tuple(Turn(roles[number % 2], text) for number, text in enumerate(texts))
    return Sample("x:1", turns, tuple(f"{number + 1}.png" for number in range(num_images)))


def test_named_images_are_shown_once_and_in_their_order():
    shown = show_numbered(sample("Is <image:2> like <image>?", "<image:2> is, <image:1> not", "And <image:1>?", "no"))
    assert [turn.text for turn in shown.turns] == [
        "Is Picture 2: <image> like Picture 1: <image>?",
        "Picture 2 is, Picture 1 not",
        "And Picture 1?",
        "no",
    ]
    assert shown.images == ("2.png", "1.png")


def test_rows_without_names_are_left_alone():
    plain = sample("<image><image>what?", "red")
    assert show_numbered(plain) is plain


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("<image:3>", "x"), "a user turn: got <image:3> and 2 images"),
        (("<image:0>", "x"), "a user turn: got <image:0> and 2 images"),
        (("<image:1><image><image>", "x"), "a user turn: got <image> and 2 images"),
        (("<image:1>", "x"), "the row: got image 2 nowhere in its texts"),
        (("<image:1>", "<image:2>"), "an answer: got <image:2>, which is not shown yet"),
    ],
)
def test_names_without_an_image(texts, message):
    with pytest.raises(UseError, match=message):
        show_numbered(sample(*texts))


def test_from_a_file_to_tokens(qwen_dir, tmp_path):
    for number in (1, 2):
        draw_image(tmp_path / f"{number}.png", 64 * number, 64)
    turns = [{"role": "user", "content": "<image:2> or <image:1>?"}, {"role": "assistant", "content": "<image:2>"}]
    rows = [{"messages": turns, "images": ["1.png", "2.png"]}]
    (row,) = Rows.open([str(write_jsonl(tmp_path / "rows.jsonl", rows))])
    spec, tokenizer = read_image_spec(qwen_dir, QWEN_INPUTS), Tokenizer(qwen_dir, QWEN_INPUTS.image_token_id)
    encoder = SampleEncoder(QWEN_INPUTS, spec, tokenizer, 512)
    encoded = encoder.encode(row)
    assert [str(image)[-5:] for image in encoded.images] == ["2.png", "1.png"]
    assert encoded.grids_thw == ((1, 4, 8), (1, 4, 4))
    text = tokenizer.decode(encoded.tokens_S[encoded.tokens_S != QWEN_INPUTS.image_token_id])
    assert "Picture 2:  or Picture 1: ?" in text and text.strip().endswith("Picture 2")
    assert encoder.encode_prompt(row).images == encoded.images
