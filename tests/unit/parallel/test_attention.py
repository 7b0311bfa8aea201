import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megavlm.parallel.attention import all_gather_attention, packed_attention, ring_attention
from megavlm.parallel.context import local_part

HEADS, HEAD_DIM, SCALE = 4, 8, 8**-0.5
# Sample lengths; 0: an empty sample.
ROWS = {"unequal": [5, 1, 9, 5, 0, 16], "equal": [6, 6, 6], "one": [12]}
KINDS = {"all_gather": all_gather_attention, "p2p": ring_attention}


def example(lengths, groups, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    query, key, value = (
        torch.randn(total, heads, HEAD_DIM, generator=generator).to(dtype) for heads in (HEADS, groups, groups)
    )
    upstream = torch.randn(total, HEADS * HEAD_DIM, generator=generator)
    return [query, key, value], upstream


def borders_of(lengths):
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def with_gradients(attention, tensors, upstream):
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    out = attention(*tensors)
    (out * upstream).sum().backward()
    return [out.detach(), *(tensor.grad for tensor in tensors)]


def written_out(query, key, value, borders, causal):
    """Sample by sample, softmax(q k^T) v in so many words."""
    repeat = query.shape[1] // key.shape[1]
    outputs = []
    for start, end in zip(borders[:-1], borders[1:], strict=True):
        q, k, v = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
        k, v = (tensor.repeat_interleave(repeat, 0) for tensor in (k, v))
        scores = q @ k.transpose(1, 2) * SCALE
        if causal:
            scores = scores.masked_fill(torch.ones(end - start, end - start).triu(1).bool(), float("-inf"))
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    return torch.cat(outputs)


@pytest.mark.parametrize("lengths", ROWS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_equals_sample_by_sample(lengths, groups, causal):
    borders = borders_of(ROWS[lengths])
    tensors, upstream = example(ROWS[lengths], groups)
    expected = with_gradients(lambda *qkv: written_out(*qkv, borders, causal), tensors, upstream)
    actual = with_gradients(lambda *qkv: packed_attention(*qkv, borders, causal, SCALE), tensors, upstream)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_sample_is_blind_to_the_others():
    lengths = ROWS["unequal"]
    borders = borders_of(lengths)
    tensors, _ = example(lengths, 2)
    before = packed_attention(*tensors, borders, True, SCALE)
    changed = [tensor.clone() for tensor in tensors]
    for tensor in changed:
        tensor[borders[2] : borders[3]] += 1.0
    after = packed_attention(*changed, borders, True, SCALE)
    inside = torch.zeros(len(before), dtype=torch.bool)
    inside[borders[2] : borders[3]] = True
    assert torch.equal(after[~inside], before[~inside]) and not torch.equal(after[inside], before[inside])


def test_packed_uses_torchs_own_attention_for_one_sample():
    tensors, _ = example(ROWS["one"], HEADS)
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in tensors)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)[0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(packed_attention(*tensors, [0, 12], True, SCALE), expected, rtol=0, atol=1e-6)


# In units of 2 * context ranks, so that every sample divides.
CONTEXT_ROWS = {"unequal": [3, 1, 5, 0, 2], "one": [4]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("row", CONTEXT_ROWS)
def test_context_parallel_equals_one_rank(kind, size, groups, row, workers):
    lengths = [2 * size * units for units in CONTEXT_ROWS[row]]
    tensors, upstream = example(lengths, groups)
    borders = borders_of(lengths)
    expected = with_gradients(lambda *qkv: packed_attention(*qkv, borders, True, SCALE), tensors, upstream)
    results = workers(size).run(on_ranks, kind=kind, lengths=lengths, tensors=tensors, upstream=upstream)
    for rank, actual in enumerate(results):
        for ours, theirs in zip(actual, expected, strict=True):
            mine = local_part(theirs, torch.tensor(borders), size, rank)
            torch.testing.assert_close(ours, mine, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_context_parallel_in_bf16(kind, workers):
    lengths = [12, 4, 20]
    tensors, upstream = example(lengths, 2, torch.bfloat16)
    exact = [tensor.float() for tensor in tensors]
    expected = with_gradients(lambda *qkv: packed_attention(*qkv, borders_of(lengths), True, SCALE), exact, upstream)
    results = workers(2).run(on_ranks, kind=kind, lengths=lengths, tensors=tensors, upstream=upstream)
    for rank, actual in enumerate(results):
        for ours, theirs in zip(actual, expected, strict=True):
            mine = local_part(theirs, torch.tensor(borders_of(lengths)), 2, rank)
            assert ours.dtype == torch.bfloat16
            torch.testing.assert_close(ours.float(), mine, rtol=0.02, atol=0.02)


def on_ranks(kind, lengths, tensors, upstream):
    group = dist.group.WORLD
    borders = borders_of(lengths)
    mine = [local_part(x, torch.tensor(borders), group.size(), group.rank()) for x in (*tensors, upstream)]
    return with_gradients(lambda *qkv: KINDS[kind](*qkv, borders, group, SCALE), mine[:3], mine[3])
