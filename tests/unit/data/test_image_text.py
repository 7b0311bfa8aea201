import dataclasses

import pytest

from megavlm.data.encode import SampleEncoder, TooLong
from megavlm.data.image_text import ImageTextPrompts
from megavlm.data.images import read_image_spec
from megavlm.data.sample import Sample, Turn
from megavlm.data.tokens import Tokenizer
from megavlm.errors import UseError
from tests.unit.data.conftest import QWEN_INPUTS, draw_image


@pytest.fixture(scope="module")
def encoder_of(qwen_dir):
    tokenizer = Tokenizer(qwen_dir, QWEN_INPUTS.image_token_id, QWEN_INPUTS.has_borders)
    spec = read_image_spec(qwen_dir, QWEN_INPUTS)

    def make(image_prompt="", text_prompt="", max_length=512, **options):
        prompts = ImageTextPrompts(image_prompt, text_prompt)
        return SampleEncoder(
            QWEN_INPUTS, spec, tokenizer, max_length, row_kind="image_text", prompts=prompts, **options
        )

    return make


@pytest.fixture
def sample(tmp_path):
    files = tuple(str(draw_image(tmp_path / f"{number}.png", 96, 64, number)) for number in range(3))
    turns = (Turn("user", "<image><image><image>what is it?"), Turn("assistant", "a red square"))
    return Sample("rows.jsonl:3", turns, files)


def texts(encoder, row):
    """What the model reads of each sequence, visual tokens as one."""
    shown = []
    for part in row.parts:
        text = encoder.tokenizer.decode(row.tokens_S[part].tolist(), skip_special_tokens=False)
        shown.append(text.replace(encoder.tokenizer.image_token, ""))
    return shown


def test_images_and_their_text_are_two_questions(encoder_of, sample):
    encoder = encoder_of()
    row = encoder.encode(sample)
    asked = encoder.encode_prompt(sample)
    said = encoder.encode_prompt(Sample("", (Turn("user", "a red square"),)))
    for part, alone in zip(row.parts, (asked, said), strict=True):
        assert row.tokens_S[part].tolist() == alone.tokens_S.tolist()
        assert row.position_ids_3S[:, part].tolist() == alone.position_ids_3S.tolist()
    assert row.images == sample.images and row.num_images_together == 3
    assert row.feature_rows_V.tolist() == list(range(int((row.tokens_S == QWEN_INPUTS.image_token_id).sum())))
    assert encoder.learns(row) and not row.loss_weights_S().any()


def test_prompts_stand_in_place_of_the_question_and_behind_the_text(encoder_of, sample):
    encoder = encoder_of("in one word:", "which in one word is:")
    shown, said = texts(encoder, encoder.encode(sample))
    assert "in one word:" in shown and "what is it?" not in shown
    assert "a red square\nwhich in one word is:" in said and "<image>" not in said
    assert encoder.fingerprint not in (encoder_of().fingerprint, encoder_of("in one word:").fingerprint)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"images": ()}, ("no image", "an image (or a video)")),
        ({"turns": (Turn("user", "<image><image><image>what?"),)}, ("no text to its images", "a caption")),
        (
            {"turns": (Turn("user", "<image><image><image>what?"), Turn("assistant", "at <bbox>"))},
            ("no text to its images", "in words alone"),
        ),
        ({"weight": 2.0}, ("weight", "repeat or leave out the row")),
    ],
)
def test_rows_that_are_no_image_with_its_text_are_named(encoder_of, sample, change, parts):
    with pytest.raises(UseError) as caught:
        encoder_of().encode(dataclasses.replace(sample, **change))
    message = str(caught.value)
    assert message.startswith("rows.jsonl:3: ") and "\n" not in message
    assert all(part in message for part in parts), message


def test_a_row_with_a_sequence_that_is_too_long_is_dropped_or_an_error(encoder_of, sample):
    long = dataclasses.replace(sample, turns=(sample.turns[0], Turn("assistant", "a red square " * 60)))
    with pytest.raises(TooLong):
        encoder_of(max_length=100).encode(long)
    with pytest.raises(UseError, match=r"rows.jsonl:3: the row: got \d+ tokens; expected at most data.max_length 100"):
        encoder_of(max_length=100, too_long="stop").encode(long)
