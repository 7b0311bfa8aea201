import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megavlm.errors import UseError
from megavlm.parallel.context import local_part, zigzag_index


def borders_of(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@given(cp_size=st.sampled_from([1, 2, 3, 4, 8]), units=st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_every_token_is_held_once(cp_size, units):
    cu_seqlens = borders_of([2 * cp_size * unit for unit in units])
    parts = [zigzag_index(cu_seqlens, cp_size, rank) for rank in range(cp_size)]
    assert sorted(torch.cat(parts).tolist()) == list(range(int(cu_seqlens[-1])))
    assert len({len(part) for part in parts}) == 1


@given(cp_size=st.sampled_from([2, 4]), units=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_causal_attention_costs_every_rank_the_same(cp_size, units):
    lengths = [2 * cp_size * unit for unit in units]
    keys_seen = torch.cat([torch.arange(1, length + 1) for length in lengths])
    costs = {int(keys_seen[zigzag_index(borders_of(lengths), cp_size, rank)].sum()) for rank in range(cp_size)}
    assert len(costs) == 1


def test_the_order_is_first_chunk_then_its_mirror_in_each_sample():
    cu_seqlens = borders_of([8, 4])
    assert zigzag_index(cu_seqlens, 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert zigzag_index(cu_seqlens, 2, 1).tolist() == [2, 3, 4, 5, 9, 10]


def test_one_rank_holds_all_lengths():
    assert zigzag_index(borders_of([3, 5]), 1, 0).tolist() == list(range(8))


def test_a_part_has_the_other_axes_whole():
    tensor = torch.arange(24).reshape(12, 2)
    part = local_part(tensor, borders_of([8, 4]), 2, 1)
    assert torch.equal(part, tensor[[2, 3, 4, 5, 9, 10]])
    assert local_part(tensor, borders_of([12]), 1, 0) is tensor


def test_a_length_that_does_not_divide_is_an_error_that_says_what_to_do():
    with pytest.raises(UseError) as error:
        zigzag_index(borders_of([8, 6]), 2, 0)
    message = str(error.value)
    assert "a sample of 6 tokens" in message and "multiple of 4" in message and "fix: pad every sample" in message
