"""Rows of pretraining through the data room: captions of images, and documents whose words are all learned."""

import pytest

from megavlm.config.schema import TokenWeights
from megavlm.data.encode import open_encoder
from megavlm.data.rows import Rows
from megavlm.data.token_weights import TokenSchedule
from tests.unit.data.conftest import LLAVA_INPUTS, draw_image, write_jsonl

EVERY_WORD = TokenSchedule(((0.0, TokenWeights(instruction=1)),))


@pytest.fixture
def encode(llava_dir, tmp_path):
    for name in ("a.png", "b.png"):
        draw_image(tmp_path / name)

    def encoded(row, template, **options):
        encoder = open_encoder(llava_dir, LLAVA_INPUTS, 512, template=template, **options)
        (sample,) = Rows.open([str(write_jsonl(tmp_path / "rows.jsonl", [row]))])
        return encoder, encoder.encode(sample)

    return encoded


def learned(encoder, row):
    """What is learned, in words, and whether anything of an image is."""
    is_learned = row.loss_weights_S(encoder.token_schedule.last) > 0
    assert not is_learned[row.tokens_S == LLAVA_INPUTS.image_token_id].any()
    return encoder.tokenizer.decode(row.tokens_S[is_learned].tolist(), skip_special_tokens=False)


@pytest.mark.parametrize(
    "row",
    [
        {"txt": "a red square", "image": "a.png"},
        {
            "conversations": [
                {"from": "human", "value": "<image>\nDescribe it."},
                {"from": "gpt", "value": "a red square"},
            ],
            "image": "a.png",
        },
    ],
)
def test_of_a_caption_the_words_are_learned_behind_the_image(encode, row):
    encoder, found = encode(row, "llava_plain")
    whole = encoder.tokenizer.decode(found.tokens_S.tolist(), skip_special_tokens=False)
    assert learned(encoder, found).strip() == "a red square</s>"
    assert "escribe" not in whole and whole.replace("<image>", "").split() == ["<s>", "a", "red", "square</s>"]


def test_of_a_document_every_word_is_learned(encode):
    row = {"text": "One red square <image> two dogs <image> three circles", "images": ["a.png", "b.png"]}
    encoder, found = encode(row, "document", schedule=EVERY_WORD)
    words = learned(encoder, found)
    assert words.split() == ["One", "red", "square", "two", "dogs", "three", "circles</s>"]
    weights_S = found.loss_weights_S(encoder.token_schedule.last)
    assert set(weights_S.tolist()) == {0.0, 1.0} and len(found.grids_thw) == 2
    order = encoder.tokenizer.decode(found.tokens_S.tolist(), skip_special_tokens=False)
    assert order.index("square") < order.index("<image>") < order.index("two") < order.index("three")
    # As a conversation only what stands behind the last image is.
    assert learned(*encode(row, "document")).split() == ["three", "circles</s>"]


def test_a_document_without_images_is_learned_too(encode):
    encoder, found = encode({"text": "only words"}, "document", schedule=EVERY_WORD)
    assert learned(encoder, found).split() == ["only", "words</s>"]
