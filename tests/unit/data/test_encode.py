import dataclasses
import struct
import zlib

import numpy as np
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from megavlm.data.encode import SampleEncoder, TooLong
from megavlm.data.images import read_image_spec
from megavlm.data.sample import Box, Sample, Turn
from megavlm.data.token_weights import loss_weights
from megavlm.data.tokens import Tokenizer
from megavlm.errors import UseError
from tests.unit.data.conftest import LLAVA_INPUTS, QWEN_INPUTS, draw_image


def encoder_for(hf_dir, inputs, max_length=512):
    return SampleEncoder(
        inputs,
        read_image_spec(hf_dir, inputs),
        Tokenizer(hf_dir, inputs.image_token_id, inputs.has_borders),
        max_length,
    )


@pytest.fixture(scope="module")
def qwen(qwen_dir):
    return encoder_for(qwen_dir, QWEN_INPUTS)


@pytest.fixture(scope="module")
def llava(llava_dir):
    return encoder_for(llava_dir, LLAVA_INPUTS)


@pytest.fixture
def sample(tmp_path):
    images = (str(draw_image(tmp_path / "a.png", 96, 64)), str(draw_image(tmp_path / "b.png", 32, 160)))
    turns = (Turn("user", "<image>what is <image>?"), Turn("assistant", "a red square"))
    return Sample(sample_id="rows.jsonl:7", turns=turns, images=images)


def test_placeholders_become_as_many_tokens_as_the_grids_say(qwen, sample):
    encoded = qwen.encode(sample)
    assert encoded.grids_thw == ((1, 4, 6), (1, 10, 2))
    is_image = encoded.tokens_S == QWEN_INPUTS.image_token_id
    runs = np.flatnonzero(np.diff(is_image.astype(int), prepend=0, append=0)).reshape(-1, 2)
    assert [int(end - start) for start, end in runs] == [6, 5]
    assert encoded.tokens_S.shape == encoded.loss_weights_S().shape == encoded.position_ids_3S.shape[1:]
    short = qwen.tokenizer.encode_chat(sample.turns)
    short_tokens, short_weights = short.tokens_S, loss_weights(short.classes_S, short.scales_S)
    assert encoded.tokens_S[~is_image].tolist() == short_tokens[short_tokens != QWEN_INPUTS.image_token_id].tolist()
    assert encoded.loss_weights_S().sum() == short_weights.sum() > 0
    assert (encoded.sample_id, encoded.images) == (sample.sample_id, sample.images)


def test_positions_are_those_of_transformers(qwen, qwen_dir, sample):
    encoded = qwen.encode(sample)
    model = Qwen3VLForConditionalGeneration.from_pretrained(qwen_dir).model
    ids = torch.from_numpy(encoded.tokens_S)[None]
    grids = torch.tensor(encoded.grids_thw)
    expected, _ = model.get_rope_index(ids, (ids == QWEN_INPUTS.image_token_id).int(), image_grid_thw=grids)
    assert np.array_equal(encoded.position_ids_3S, expected[:, 0].numpy())


def test_square_images_and_linear_positions(llava, sample):
    encoded = llava.encode(sample)
    assert encoded.grids_thw == ((1, 4, 4), (1, 4, 4))
    assert (encoded.tokens_S == LLAVA_INPUTS.image_token_id).sum() == 32
    assert np.array_equal(encoded.position_ids_3S, np.tile(np.arange(len(encoded.tokens_S)), (3, 1)))


def test_text_only_row(qwen):
    encoded = qwen.encode(Sample("x:1", (Turn("user", "hi"), Turn("assistant", "yes"))))
    assert encoded.grids_thw == () and encoded.images == ()
    assert encoded.position_ids_3S[2].tolist() == list(range(len(encoded.tokens_S)))


def test_prompt_is_the_row_up_to_its_last_answer(qwen, sample):
    whole, prompt = qwen.encode(sample), qwen.encode_prompt(sample)
    length = len(prompt.tokens_S)
    assert prompt.tokens_S.tolist() == whole.tokens_S[:length].tolist()
    assert np.array_equal(prompt.position_ids_3S, whole.position_ids_3S[:, :length])
    assert not prompt.loss_weights_S().any()
    assert length == np.flatnonzero(whole.loss_weights_S())[0]
    question = dataclasses.replace(sample, turns=sample.turns[:1])
    assert qwen.encode_prompt(question).tokens_S.tolist() == prompt.tokens_S.tolist()


def test_prompt_keeps_earlier_answers(qwen):
    turns = (Turn("user", "hi"), Turn("assistant", "yes"), Turn("user", "so"), Turn("assistant", "no"))
    prompt = qwen.encode_prompt(Sample("x:1", turns))
    assert "yes" in qwen.tokenizer.decode(prompt.tokens_S) and "no" not in qwen.tokenizer.decode(prompt.tokens_S)


def test_too_long_is_told_and_never_cut(qwen_dir, qwen, sample):
    length = len(qwen.encode(sample).tokens_S)
    exact = encoder_for(qwen_dir, QWEN_INPUTS, max_length=length)
    assert len(exact.encode(sample).tokens_S) == length
    tight = encoder_for(qwen_dir, QWEN_INPUTS, max_length=length - 1)
    with pytest.raises(TooLong, match=rf"rows\.jsonl:7: {length} tokens") as caught:
        tight.encode(sample)
    assert (caught.value.sample_id, caught.value.num_tokens) == ("rows.jsonl:7", length)


def test_model_token_in_the_text_is_refused(qwen, sample):
    turns = (Turn("user", "<image><image> <|image_pad|>"), sample.turns[1])
    for encode in (qwen.encode, qwen.encode_prompt):
        with pytest.raises(UseError, match=r"rows\.jsonl:7: a user turn: got the model's own token <\|image_pad\|>"):
            encode(dataclasses.replace(sample, turns=turns))


def test_images_that_the_template_does_not_print_are_refused(qwen, sample):
    turns = (Turn("user", "<image>what?"), sample.turns[1])
    with pytest.raises(UseError, match=r"rows\.jsonl:7: the chat template: got 1 image tokens; expected 2"):
        qwen.encode(dataclasses.replace(sample, turns=turns))


def test_token_id_out_of_range_is_refused(qwen_dir, sample):
    small = dataclasses.replace(QWEN_INPUTS, vocab_size=100)
    with pytest.raises(UseError, match=r"rows\.jsonl:7: the tokenizer: got token id \d+; expected ids below .* 100"):
        encoder_for(qwen_dir, small).encode(sample)


def test_broken_image_is_named_with_its_row(qwen, sample, tmp_path):
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(UseError, match=r"rows\.jsonl:7: .*b\.png: got unreadable image"):
        qwen.encode(sample)


def test_extreme_image_is_named_with_its_row(qwen, sample, tmp_path):
    draw_image(tmp_path / "b.png", 1000, 4)
    with pytest.raises(UseError, match=r"rows\.jsonl:7: .*b\.png: image size: got 1000 x 4"):
        qwen.encode(sample)


def png_header(width, height):
    """A PNG whose pixels never come."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""))
    packed = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        packed += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return packed


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_picture_that_is_too_large_is_refused_by_its_header(qwen_dir, tmp_path):
    """20,000 x 20,000 by default; what is just allowed is 20,000 x 1,000, and the recipe may say less."""
    encoder = encoder_for(qwen_dir, QWEN_INPUTS, max_length=10**6)
    turns = (Turn("user", "<image>?"), Turn("assistant", "x"))
    for width, height, allowed in ((20_000, 20_000, False), (10_000, 10_000, False), (20_000, 1_000, True)):
        path = tmp_path / f"{width}x{height}.png"
        path.write_bytes(png_header(width, height))
        sample = Sample("rows.jsonl:7", turns, (str(path),))
        if allowed:
            assert encoder.encode(sample).grids_thw
            continue
        with pytest.raises(UseError, match=rf"rows\.jsonl:7: .*{width}x{height}\.png: got .*(image of|exceeds limit)"):
            encoder.encode(sample)
    small = SampleEncoder(QWEN_INPUTS, encoder.image_spec, encoder.tokenizer, 10**6, max_image_pixels=10**6)
    with pytest.raises(
        UseError, match=r"an image of 20000x1000 pixels; expected at most data\.max_image_pixels 1,000,000"
    ):
        small.encode(Sample("rows.jsonl:7", turns, (str(tmp_path / "20000x1000.png"),)))


def test_boxes_are_written_before_tokens_are_made(qwen, qwen_dir, sample):
    boxed = dataclasses.replace(
        sample,
        turns=(Turn("user", "<image>what is <image><ref-object>?"), Turn("assistant", "<bbox>")),
        boxes=(Box("this", (16, 80, 32, 160), "real", 1),),
    )
    with pytest.raises(UseError, match=r"rows\.jsonl:7: data\.box_format: got nothing"):
        qwen.encode(boxed)
    by_format = {
        box_format: SampleEncoder(QWEN_INPUTS, qwen.image_spec, qwen.tokenizer, 512, box_format=box_format)
        for box_format in ("json_1000", "json_pixels")
    }
    answers = {"json_1000": "[500, 500, 1000, 1000]", "json_pixels": "[16, 80, 32, 160]"}
    for box_format, encoder in by_format.items():
        written = dataclasses.replace(
            sample,
            turns=(Turn("user", "<image>what is <image>this?"), Turn("assistant", answers[box_format])),
        )
        assert encoder.encode(boxed).tokens_S.tolist() == qwen.encode(written).tokens_S.tolist()
        assert encoder.encode_prompt(boxed).tokens_S.tolist() == qwen.encode_prompt(written).tokens_S.tolist()


def test_pixels_of_a_picture_that_no_model_sees_as_a_whole(llava, sample):
    encoder = SampleEncoder(LLAVA_INPUTS, llava.image_spec, llava.tokenizer, 512, box_format="json_pixels")
    with pytest.raises(UseError, match="thousandths or numbers with this family"):
        encoder.encode(dataclasses.replace(sample, boxes=(Box("", (1, 2)),)))
