import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megavlm.parallel.attention import all_gather_attention, gathered_segments, packed_attention, ring_attention
from megavlm.parallel.context import local_part

HEADS, HEAD_DIM, SCALE = 4, 8, 8**-0.5
# Sample lengths; 0: an empty sample.
ROWS = {"unequal": [5, 1, 9, 5, 0, 16], "alternating": [3, 2] * 5, "equal": [6, 6, 6], "one": [12]}
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


@pytest.mark.parametrize("size", [2, 4])
def test_gathered_segments_see_their_samples_beginning(size):
    """With these segments, causal attention that ends at the last key is the whole row's, rank by rank."""
    lengths = [8, 16, 0, 8]
    borders, total = borders_of(lengths), sum(lengths)
    tensors, _ = example(lengths, 2)
    expected = packed_attention(*tensors, borders, True, SCALE)
    parts = [[local_part(t, torch.tensor(borders), size, rank) for t in tensors] for rank in range(size)]
    gathered = [torch.cat([part[which] for part in parts]) for which in (1, 2)]
    for rank in range(size):
        segments = gathered_segments(borders, size, rank)
        key, value = (tensor[segments.keys] for tensor in gathered)
        outputs = []
        for number in range(len(segments.borders_q) - 1):
            of_q, of_k = (
                slice(*edges[number : number + 2].tolist()) for edges in (segments.borders_q, segments.borders_k)
            )
            q, k, v = (t.transpose(0, 1)[None] for t in (parts[rank][0][of_q], key[of_k], value[of_k]))
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE, enable_gqa=True)
            outputs.append(out[0].transpose(0, 1).flatten(1))
        ours = torch.cat(outputs)
        assert len(ours) == total // size
        torch.testing.assert_close(ours, local_part(expected, torch.tensor(borders), size, rank), rtol=1e-5, atol=1e-6)
        for edges, longest in ((segments.borders_q, segments.longest_q), (segments.borders_k, segments.longest_k)):
            assert edges.dtype == torch.int32 and int(edges.diff().max()) == longest
