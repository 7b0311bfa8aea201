import numpy as np
import pytest
import torch

from megavlm.data.packing import pack, pad_to
from megavlm.data.sample import EncodedSample
from megavlm.data.token_weights import RESPONSE


def encoded(tokens, weights, grids=(), name="x:1"):
    length = len(tokens)
    return EncodedSample(
        sample_id=name,
        tokens_S=np.array(tokens, dtype=np.int64),
        token_classes_S=np.full(len(tokens), RESPONSE, dtype=np.int8),
        scales_S=np.array(weights, dtype=np.float32),
        position_ids_3S=np.stack([np.arange(length), np.arange(length) * 2, np.arange(length) * 3]),
        images=("unused.png",) * len(grids),
        grids_thw=tuple(grids),
    )


SAMPLES = [
    encoded([11, 12, 13], [0, 0, 1], [(1, 2, 2)], "x:1"),
    encoded([21, 22, 23, 24, 25], [0, 2, 0, 0, 0.5], name="x:2"),
]
PATCHES = [torch.arange(12.0).reshape(4, 3)]


def do_pack(samples=SAMPLES, patches=PATCHES, sample_multiple=1, total_multiple=1):
    return pack(
        samples,
        patches,
        sample_multiple=sample_multiple,
        total_multiple=total_multiple,
        pad_token_id=9,
        patch_channels=3,
    )


def test_labels_are_the_next_token_of_the_same_sample():
    batch = do_pack()
    assert batch.tokens_T.tolist() == [11, 12, 13, 21, 22, 23, 24, 25]
    assert batch.labels_T.tolist() == [12, 13, 0, 22, 23, 24, 25, 0]
    assert batch.loss_weights_T.tolist() == [0, 1, 0, 2, 0, 0, 0.5, 0]
    assert batch.position_ids_3T[1].tolist() == [0, 2, 4, 0, 2, 4, 6, 8]
    assert batch.cu_seqlens.tolist() == [0, 3, 8]
    assert batch.grid_thw_N3.tolist() == [[1, 2, 2]]
    assert torch.equal(batch.patches_PC, PATCHES[0])
    assert batch.sample_ids == ("x:1", "x:2")
    assert batch.num_real_tokens == 8


def test_the_weight_of_a_first_token_goes_nowhere():
    batch = do_pack([encoded([1, 2], [5, 0]), encoded([3, 4], [7, 0])], [])
    assert batch.loss_weights_T.tolist() == [0, 0, 0, 0]


def test_padding_of_samples_and_of_the_row():
    batch = do_pack(sample_multiple=4, total_multiple=16)
    assert batch.tokens_T.tolist() == [11, 12, 13, 9, 21, 22, 23, 24, 25, 9, 9, 9, 9, 9, 9, 9]
    assert batch.labels_T.tolist() == [12, 13, 0, 0, 22, 23, 24, 25, 0, 0, 0, 0, 0, 0, 0, 0]
    assert batch.loss_weights_T.tolist() == [0, 1, 0, 0, 2, 0, 0, 0.5, 0, 0, 0, 0, 0, 0, 0, 0]
    assert batch.position_ids_3T[0].tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 4, 12, 16]
    assert batch.num_real_tokens == 8


@pytest.mark.parametrize("sample_multiple", [1, 2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_every_segment_divides_and_nothing_is_lost(sample_multiple, rounds):
    total_multiple = sample_multiple * rounds
    batch = do_pack(sample_multiple=sample_multiple, total_multiple=total_multiple)
    assert len(batch.tokens_T) % total_multiple == 0
    assert batch.cu_seqlens[-1] == len(batch.tokens_T) == batch.position_ids_3T.shape[1]
    lengths = batch.cu_seqlens.diff()
    assert (lengths > 0).all() and (lengths % sample_multiple == 0).all()
    plain = do_pack()
    assert batch.loss_weights_T.sum() == plain.loss_weights_T.sum()
    assert batch.tokens_T[batch.tokens_T != 9].tolist() == plain.tokens_T.tolist()


def test_types():
    batch = do_pack()
    assert batch.tokens_T.dtype == batch.labels_T.dtype == batch.position_ids_3T.dtype == torch.int64
    assert batch.loss_weights_T.dtype == batch.patches_PC.dtype == torch.float32
    assert batch.cu_seqlens.dtype == torch.int32 and batch.grid_thw_N3.dtype == torch.int64


def test_text_only_row_has_no_patches():
    batch = do_pack(SAMPLES[1:], [])
    assert batch.patches_PC.shape == (0, 3)
    assert batch.grid_thw_N3.shape == (0, 3)


def test_patches_unlike_the_grids_are_caught():
    with pytest.raises(AssertionError):
        do_pack(patches=[])
    with pytest.raises(AssertionError):
        do_pack(patches=PATCHES * 2)


def test_pixels_can_be_left_out():
    batch, whole = do_pack(patches=None), do_pack()
    assert batch.patches_PC.shape == (0, 3)
    assert torch.equal(batch.grid_thw_N3, whole.grid_thw_N3) and torch.equal(batch.tokens_T, whole.tokens_T)


def test_row_is_filled_up_by_one_more_segment():
    batch = do_pack(sample_multiple=4, total_multiple=4)
    longer = pad_to(batch, 20)
    assert longer.cu_seqlens.tolist() == [0, 4, 12, 20] and longer.cu_seqlens.dtype == torch.int32
    assert torch.equal(longer.tokens_T[:12], batch.tokens_T) and set(longer.tokens_T[12:].tolist()) == {9}
    for name in ("labels_T", "loss_weights_T", "position_ids_3T"):
        left, right = getattr(batch, name), getattr(longer, name)
        assert torch.equal(right[..., :12], left) and not right[..., 12:].any() and right.shape[-1] == 20
    assert longer.num_real_tokens == 8
    assert pad_to(batch, 12) is batch
    with pytest.raises(AssertionError):
        pad_to(batch, 8)


def test_padding_does_not_write_into_the_samples():
    do_pack(sample_multiple=8, total_multiple=8).tokens_T.zero_()
    assert SAMPLES[0].tokens_S.tolist() == [11, 12, 13]
