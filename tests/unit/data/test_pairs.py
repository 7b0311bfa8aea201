import dataclasses

import numpy as np
import pytest
import torch

from megavlm.data.encode import SampleEncoder, TooLong
from megavlm.data.images import read_image_spec
from megavlm.data.packing import pack
from megavlm.data.pairs import rejected_of
from megavlm.data.sample import Sample, Turn
from megavlm.data.tokens import Tokenizer
from megavlm.errors import UseError
from tests.unit.data.conftest import QWEN_INPUTS, draw_image


def encoder_for(hf_dir, row_kind="pair", max_length=512):
    tokenizer = Tokenizer(hf_dir, QWEN_INPUTS.image_token_id, QWEN_INPUTS.has_borders)
    spec = read_image_spec(hf_dir, QWEN_INPUTS)
    return SampleEncoder(QWEN_INPUTS, spec, tokenizer, max_length, row_kind=row_kind)


@pytest.fixture(scope="module")
def pairs(qwen_dir):
    return encoder_for(qwen_dir)


@pytest.fixture(scope="module")
def single(qwen_dir):
    return encoder_for(qwen_dir, "conversation")


@pytest.fixture
def sample(tmp_path):
    question = Turn("user", "<image>what is <image>?")
    return Sample(
        sample_id="rows.jsonl:7",
        turns=(question, Turn("assistant", "a red square")),
        images=(str(draw_image(tmp_path / "a.png", 96, 64)), str(draw_image(tmp_path / "b.png", 32, 160))),
        rejected_turns=(question, Turn("assistant", "the lazy dog over there, it is brown")),
        margin=0.5,
    )


def test_a_pair_is_both_conversations_and_their_images_once(pairs, single, sample):
    pair, chosen, rejected = pairs.encode(sample), single.encode(sample), single.encode(rejected_of(sample))
    assert pair.part_lengths == (len(chosen.tokens_S), len(rejected.tokens_S))
    for part, alone in zip(pair.parts, (chosen, rejected), strict=True):
        assert pair.tokens_S[part].tolist() == alone.tokens_S.tolist()
        assert pair.loss_weights_S()[part].tolist() == alone.loss_weights_S().tolist()
        assert pair.position_ids_3S[:, part].tolist() == alone.position_ids_3S.tolist()
    assert (pair.images, pair.grids_thw, pair.target) == (sample.images, chosen.grids_thw, 0.5)
    num_visual = int((chosen.tokens_S == QWEN_INPUTS.image_token_id).sum())
    assert pair.feature_rows_V.tolist() == [*range(num_visual)] * 2
    assert pairs.learns(pair)


def test_images_of_the_rejected_answer_are_told_apart(pairs, sample, tmp_path):
    other = str(draw_image(tmp_path / "c.png", 64, 64))
    changed = dataclasses.replace(sample, rejected_turns=(), rejected_images=(sample.images[1], other))
    pair = pairs.encode(changed)
    assert pair.images == (*sample.images, other)
    counts = [QWEN_INPUTS.num_image_tokens(grid) for grid in pair.grids_thw]
    first, second = counts[0], counts[0] + counts[1]
    assert pair.feature_rows_V.tolist() == [*range(second), *range(first, second), *range(second, sum(counts))]
    assert pair.num_images_together == 2


def test_packed_pairs_keep_borders_and_features_apart(pairs, single, sample):
    text_only = dataclasses.replace(
        sample,
        turns=(Turn("user", "what?"), sample.turns[1]),
        rejected_turns=(Turn("user", "what?"), sample.rejected_turns[1]),
        images=(),
        margin=None,
    )
    rows = [pairs.encode(sample), pairs.encode(text_only), pairs.encode(sample)]
    sizes = {"sample_multiple": 4, "total_multiple": 8, "pad_token_id": 0, "patch_channels": QWEN_INPUTS.patch_channels}
    batch = pack(rows, None, **sizes)
    each = [single.encode(one) for sample in (sample, text_only, sample) for one in (sample, rejected_of(sample))]
    starts = batch.cu_seqlens.tolist()
    assert len(each) == 6 and all(start % 4 == 0 for start in starts)
    for start, alone in zip(starts, each, strict=False):
        end = start + len(alone.tokens_S)
        assert batch.tokens_T[start:end].tolist() == alone.tokens_S.tolist()
        assert batch.labels_T[start : end - 1].tolist() == alone.tokens_S[1:].tolist()
        assert batch.loss_weights_T[start : end - 1].tolist() == alone.loss_weights_S()[1:].tolist()
        assert batch.loss_weights_T[end - 1] == 0
    num_visual = len(rows[0].feature_rows_V) // 2
    assert batch.feature_rows_V.tolist() == [*[*range(num_visual)] * 2, *[*range(num_visual, 2 * num_visual)] * 2]
    assert (batch.num_parts, batch.targets_N.tolist()) == (2, [0.5, 0.0, 0.5])
    assert int((batch.tokens_T == QWEN_INPUTS.image_token_id).sum()) == len(batch.feature_rows_V)
    assert torch.equal(batch.grid_thw_N3, torch.tensor([*rows[0].grids_thw, *rows[2].grids_thw]))


def test_a_pair_is_learned_where_both_answers_are(pairs, sample):
    pair = pairs.encode(sample)
    half = dataclasses.replace(pair, scales_S=np.where(np.arange(len(pair.tokens_S)) < pair.part_lengths[0], 1, 0))
    assert pairs.learns(pair) and not pairs.learns(half)


def test_a_pair_is_dropped_when_one_of_it_is_too_long(qwen_dir, single, sample):
    lengths = [len(single.encode(one).tokens_S) for one in (sample, rejected_of(sample))]
    assert lengths[0] < lengths[1]
    with pytest.raises(TooLong):
        encoder_for(qwen_dir, max_length=lengths[1] - 1).encode(sample)
    assert encoder_for(qwen_dir, max_length=lengths[1]).encode(sample).part_lengths == tuple(lengths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected_turns": ()}, "no answer that is worse"),
        ({"rejected_images": ("a.png",)}, "rejected_images: got 1 images"),
        ({"weight": 2.0}, "weight: got 2.0"),
    ],
)
def test_a_row_that_is_no_pair_is_named(pairs, sample, change, message):
    with pytest.raises(UseError, match=f"rows.jsonl:7: .*{message}"):
        pairs.encode(dataclasses.replace(sample, **change))


def test_what_becomes_of_rows_is_in_the_fingerprint(pairs, single):
    assert pairs.fingerprint != single.fingerprint
