import dataclasses

import pytest
import torch

from megavlm.data.dataset import Dataset
from megavlm.data.encode import SampleEncoder
from megavlm.data.image_text import ImageTextPrompts
from megavlm.data.images import read_image_spec
from megavlm.data.loader import BatchLoader
from megavlm.data.matching import content_digests, encode_match
from megavlm.data.packing import add_sequences, pack
from megavlm.data.sample import InlineBytes, MicrobatchOrder, Sample, Turn
from megavlm.data.tokens import Tokenizer
from tests.unit.data.conftest import QWEN_INPUTS, draw_image

SIZES = {"sample_multiple": 4, "total_multiple": 16}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return [str(draw_image(folder / f"{n}.png", 64 + 32 * n, 64, n)) for n in range(3)]


@pytest.fixture(scope="module")
def dataset(qwen_dir, files):
    """Rows with one image, with two of which one stands there twice, and with another text of the first's image."""
    tokenizer = Tokenizer(qwen_dir, QWEN_INPUTS.image_token_id, QWEN_INPUTS.has_borders)
    spec = read_image_spec(qwen_dir, QWEN_INPUTS)
    prompts = ImageTextPrompts("", "in one word:")
    encoder = SampleEncoder(QWEN_INPUTS, spec, tokenizer, 512, row_kind="image_text", prompts=prompts)
    twice = (files[1], files[2], files[1])
    rows = [
        row(0, "<image>what is it?", "a red square", (files[0],)),
        row(1, "<image> and <image>, <image>?", "the blue circle 0 1 2", twice),
        row(2, "<image>which?", "brown fox", (files[0],)),
    ]
    made = Dataset(rows, encoder)
    made.prepare()
    return made


def row(number, question, answer, images):
    return Sample(f"rows.jsonl:{number + 1}", (Turn("user", question), Turn("assistant", answer)), images)


@pytest.mark.parametrize("prompt", ["", "does the text match?"])
def test_a_pair_is_a_question_with_the_images_and_the_other_text(dataset, files, prompt):
    behind = f"\n{prompt}" if prompt else ""
    for shown, said, placeholders, images, text in (
        (0, 0, "<image>", files[:1], "a red square"),
        (0, 1, "<image>", files[:1], "the blue circle 0 1 2"),
        (1, 2, "<image><image><image>", [files[1], files[2], files[1]], "brown fox"),
    ):
        asked = Sample("", (Turn("user", f"{placeholders}\n{text}{behind}"),), tuple(images))
        expected = dataset.encoder.encode_prompt(asked)
        found = encode_match(dataset, shown, said, prompt)
        assert found.tokens_S.tolist() == expected.tokens_S.tolist()
        assert found.position_ids_3S.tolist() == expected.position_ids_3S.tolist()
        assert found.grids_thw == expected.grids_thw


def test_headers_of_known_images_are_not_read_again(dataset, monkeypatch):
    def read(*_):
        raise AssertionError("an image was opened")

    monkeypatch.setattr(SampleEncoder, "_image_size", read)
    assert len(encode_match(dataset, 0, 1, "").tokens_S) > 20


def test_pairs_behind_a_packed_row_take_the_features_of_its_images(dataset):
    samples = [dataset.encoded(index) for index in (1, 0)]
    batch = pack(samples, None, pad_token_id=0, patch_channels=QWEN_INPUTS.patch_channels, **SIZES)
    pairs = [encode_match(dataset, *pair, "") for pair in ((0, 1), (1, 1), (1, 0))]
    longer = add_sequences(batch, pairs, [1, 0, 0], QWEN_INPUTS.image_token_id, **SIZES)
    first, second = (len(dataset.encoded(index).parts) for index in (1, 0))
    assert (first, second) == (2, 2) and len(longer.tokens_T) % SIZES["total_multiple"] == 0
    borders = longer.cu_seqlens.tolist()
    for start, pair in zip(borders[4:], pairs, strict=False):
        tokens = longer.tokens_T[start : start + len(pair.tokens_S)]
        assert tokens.tolist() == pair.tokens_S.tolist() and start % SIZES["sample_multiple"] == 0
        assert longer.position_ids_3T[:, start : start + len(pair.tokens_S)].tolist() == pair.position_ids_3S.tolist()
        assert longer.real_T[start : start + len(pair.tokens_S)].all()
    end = borders[4]
    for name in ("tokens_T", "labels_T", "real_T", "loss_weights_T"):
        assert torch.equal(vars(longer)[name][:end], vars(batch)[name][:end]), name
    # what the first sequence of each sample sees, which for row 1 are two images, one of them twice
    of_1, of_0 = (samples[number].feature_rows_V.tolist() for number in (0, 1))
    of_0 = [number + max(of_1) + 1 for number in of_0]
    assert longer.feature_rows_V.tolist() == [*of_1, *of_0, *of_0, *of_1, *of_1]
    assert longer.num_real_tokens == int(longer.real_T.sum()) and not longer.loss_weights_T.any()
    assert torch.equal(longer.grid_thw_N3, batch.grid_thw_N3)


def test_rows_that_show_or_say_the_same_have_the_same_digests(dataset):
    shown, said = zip(*(content_digests(dataset.encoded(index)) for index in range(3)), strict=True)
    assert shown[0] == shown[2] != shown[1] and len(set(said)) == 3
    first = dataset.encoded(0)
    inline = [dataclasses.replace(first, images=(InlineBytes(data, "cell"),)) for data in (b"a", b"b")]
    assert content_digests(inline[0])[0] != content_digests(inline[1])[0]
    loader = BatchLoader(dataset, lambda _: [MicrobatchOrder((2, 0))], 1, 1)
    (found,) = loader.batches(0)
    assert found.batch.contents_N3.tolist() == [[2, shown[2], said[2]], [0, shown[0], said[0]]]
