"""Attention over packed rows in plain torch: within one rank, and over context-parallel ranks two ways.

Transformer Engine has fused kernels for all three; these run anywhere and define what is correct.

Shape suffixes: T tokens of the rank's packed row, H query heads, G key/value heads, D head dim; q/k/v are T?D.
Ring attention: Liu et al., arXiv 2310.01889; online softmax: Milakov & Gimelshein, arXiv 1805.02867.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

Prefix = tuple[torch.Tensor, torch.Tensor]
"""Keys and values [P, G, D] that stand in front of every sample's."""

RUNS_PER_LENGTH = 2
"""So many runs of neighbours of one length, for each length, are attended to as they stand; more are put in order."""


def packed_attention(
    query_THD: torch.Tensor,
    key_TGD: torch.Tensor,
    value_TGD: torch.Tensor,
    borders: list[int],
    causal: bool,
    scale: float,
    dropout: float = 0.0,
    prefix: Prefix | None = None,
) -> torch.Tensor:
    """Attention inside each sample of a packed row, all samples on this rank.

    Samples of equal length run as one batch: neighbours as they stand, or all of them, brought together by a copy, if
    that makes few batches of many (windows of a vision tower). Costs sum(length^2), never T^2. All tokens of all
    samples see `prefix`.

    Returns:
        [T, H * D], dtype of the query.
    """
    lengths = [end - start for start, end in itertools.pairwise(borders) if end > start]
    runs = [(len(list(run)), length) for length, run in itertools.groupby(lengths)]
    order = None
    if len(runs) > RUNS_PER_LENGTH * len(set(lengths)):
        order, runs = _by_length(borders)
        order = order.to(query_THD.device)
        query_THD, key_TGD, value_TGD = (x.index_select(0, order) for x in (query_THD, key_TGD, value_TGD))
    sizes = [count * length for count, length in runs]
    cut = [(x,) if len(sizes) == 1 else x.split(sizes) for x in (query_THD, key_TGD, value_TGD)]
    outputs = []
    for (count, length), *parts in zip(runs, *cut, strict=True):
        q, k, v = (x.view(count, length, *x.shape[1:]).transpose(1, 2) for x in parts)
        mask = None
        if prefix is not None:
            k, v = (_behind(one, x) for one, x in zip(prefix, (k, v), strict=True))
            mask = _late_mask(length, k.shape[2], k.device) if causal else None
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=causal and mask is None,
            scale=scale,
            dropout_p=dropout,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(out.transpose(1, 2).reshape(count * length, -1))
    packed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if order is None:
        return packed
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return packed.index_select(0, inverse)


def _by_length(borders: list[int]) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """The order of tokens (int64) that brings samples of equal length together, and (number, length) of those."""
    starts: dict[int, list[int]] = {}
    for start, end in itertools.pairwise(borders):
        if end > start:
            starts.setdefault(end - start, []).append(start)
    rows = [torch.tensor(at)[:, None] + torch.arange(length) for length, at in starts.items()]
    return torch.cat([row.flatten() for row in rows]), [(len(at), length) for length, at in starts.items()]


def _behind(prefix_PGD: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """A prefix in front of the keys (or values) [batch, G, length, D] of each sample."""
    first = prefix_PGD.transpose(0, 1).expand(len(keys), -1, -1, -1)
    return torch.cat((first.to(keys.dtype), keys), dim=2)


@dataclass(frozen=True)
class _Pair:
    """A chunk of local queries and a chunk of some rank's keys that it may see."""

    query: slice
    key: slice
    diagonal: bool


def _pairs(borders: list[int], cp_size: int, query_rank: int, key_rank: int) -> list[_Pair]:
    """Chunk pairs with key chunk <= query chunk, per sample; slices are in each rank's local order."""
    pairs = []
    for start, end in zip(borders[:-1], borders[1:], strict=True):
        chunk = (end - start) // (2 * cp_size)
        if not chunk:
            continue
        local = start // cp_size
        for i, query_chunk in enumerate((query_rank, 2 * cp_size - 1 - query_rank)):
            for j, key_chunk in enumerate((key_rank, 2 * cp_size - 1 - key_rank)):
                if key_chunk <= query_chunk:
                    query = slice(local + i * chunk, local + (i + 1) * chunk)
                    key = slice(local + j * chunk, local + (j + 1) * chunk)
                    pairs.append(_Pair(query, key, key_chunk == query_chunk))
    return pairs


class _GatherRanks(torch.autograd.Function):
    """All ranks' tensors stacked on a new first axis; backward sums each rank's gradient where it came from."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        gathered = tensor.new_empty(group.size(), *tensor.shape)
        dist.all_gather_into_tensor(gathered.flatten(0, 1), tensor.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        grad = grads[0].contiguous()
        mine = grad.new_empty(grad.shape[1:])
        dist.reduce_scatter_tensor(mine, grad.flatten(0, 1), group=ctx.group)
        return mine, None


def gather_ranks(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """All ranks' tensors stacked on a new first axis; gradients go back to where they came from, added up."""
    gathered: torch.Tensor = _GatherRanks.apply(tensor, group)
    return gathered


def all_gather_attention(
    query_THD: torch.Tensor,
    key_TGD: torch.Tensor,
    value_TGD: torch.Tensor,
    borders: list[int],
    group: dist.ProcessGroup,
    scale: float,
    prefix: Prefix | None = None,
) -> torch.Tensor:
    """Causal attention with every rank's keys and values gathered first; all tokens see `prefix`.

    `borders` are those of the whole row (all ranks), the tensors this rank's zig-zag part. Returns [T, H * D].
    """
    cp_size, cp_rank = group.size(), group.rank()
    keys = _GatherRanks.apply(key_TGD, group)
    values = _GatherRanks.apply(value_TGD, group)
    outputs = []
    for start, end in zip(borders[:-1], borders[1:], strict=True):
        chunk = (end - start) // (2 * cp_size)
        if not chunk:
            continue
        local = start // cp_size
        # chunk c of the sample lies on rank c (first half) or 2*cp-1-c (second half)
        spots = [(c, local) if c < cp_size else (2 * cp_size - 1 - c, local + chunk) for c in range(2 * cp_size)]
        for i, query_chunk in enumerate((cp_rank, 2 * cp_size - 1 - cp_rank)):
            q = query_THD[local + i * chunk : local + (i + 1) * chunk]
            seen = spots[: query_chunk + 1]
            first_k, first_v = ([], []) if prefix is None else ([one.to(keys.dtype)] for one in prefix)
            k = torch.cat([*first_k, *(keys[rank, at : at + chunk] for rank, at in seen)])
            v = torch.cat([*first_v, *(values[rank, at : at + chunk] for rank, at in seen)])
            outputs.append(_late_causal(q, k, v, scale))
    return torch.cat(outputs)


@dataclass(frozen=True)
class Segments:
    """A rank's queries and the keys that they see, as segments of two packed rows; causal masks end at the last key.

    Attributes:
        keys: int64, of all ranks' keys behind each other those that are seen, segment after segment.
        borders_q: int32, of the queries' segments, in this rank's order.
        borders_k: int32, of the keys' segments.
        longest_q: tokens of the longest segment of queries.
        longest_k: tokens of the longest segment of keys.
    """

    keys: torch.Tensor
    borders_q: torch.Tensor
    borders_k: torch.Tensor
    longest_q: int
    longest_k: int


def gathered_segments(borders: list[int], cp_size: int, cp_rank: int) -> Segments:
    """What a rank attends to once all ranks' keys are gathered: each of its chunks sees its sample up to its own end.

    Args:
        borders: of the samples of the whole row.
        cp_size: context-parallel ranks.
        cp_rank: this one.
    """
    tokens_per_rank = borders[-1] // cp_size
    keys, lengths_q, lengths_k = [], [0], [0]
    for start, end in zip(borders[:-1], borders[1:], strict=True):
        chunk = (end - start) // (2 * cp_size)
        if not chunk:
            continue
        local = start // cp_size
        spots = [rank * tokens_per_rank + local for rank in range(cp_size)]
        spots += [rank * tokens_per_rank + local + chunk for rank in reversed(range(cp_size))]
        for query_chunk in (cp_rank, 2 * cp_size - 1 - cp_rank):
            keys += [torch.arange(at, at + chunk) for at in spots[: query_chunk + 1]]
            lengths_q.append(chunk)
            lengths_k.append(chunk * (query_chunk + 1))
    borders_q, borders_k = (torch.tensor(lengths, dtype=torch.int32).cumsum(0) for lengths in (lengths_q, lengths_k))
    return Segments(
        torch.cat(keys), borders_q.to(torch.int32), borders_k.to(torch.int32), max(lengths_q), max(lengths_k)
    )


def _late_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Queries are the last len(q) positions of the keys' sequence."""
    mask = _late_mask(len(q), len(k), q.device)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1).flatten(1)


def _late_mask(num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """Which keys the last positions of a sequence see."""
    queries = torch.arange(num_queries, device=device)[:, None] + num_keys - num_queries
    return torch.arange(num_keys, device=device) <= queries


def ring_attention(
    query_THD: torch.Tensor,
    key_TGD: torch.Tensor,
    value_TGD: torch.Tensor,
    borders: list[int],
    group: dist.ProcessGroup,
    scale: float,
) -> torch.Tensor:
    """Causal attention with keys and values passed round the ring; softmax state in fp32. Returns [T, H * D]."""
    out: torch.Tensor = _Ring.apply(query_THD, key_TGD, value_TGD, borders, group, scale)
    return out.flatten(1)


def _pass_on(group: dist.ProcessGroup, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Send to the next rank of the ring, receive from the one before."""
    size, rank = group.size(), group.rank()
    following = dist.get_global_rank(group, (rank + 1) % size)
    previous = dist.get_global_rank(group, (rank - 1) % size)
    received = [torch.empty_like(tensor) for tensor in tensors]
    operations = []
    for tensor, buffer in zip(tensors, received, strict=True):
        operations.append(dist.P2POp(dist.isend, tensor.contiguous(), following, group))
        operations.append(dist.P2POp(dist.irecv, buffer, previous, group))
    for request in dist.batch_isend_irecv(operations):
        request.wait()
    return received


def _heads_first(tensor: torch.Tensor, repeat: int) -> torch.Tensor:
    """[t, g, d] -> [g * repeat, t, d] in fp32."""
    return tensor.float().transpose(0, 1).repeat_interleave(repeat, 0)


def _scores(q: torch.Tensor, k: torch.Tensor, diagonal: bool, scale: float) -> torch.Tensor:
    scores = q @ k.transpose(1, 2) * scale
    if diagonal:
        ahead = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(ahead, float("-inf"))
    return scores


class _Ring(torch.autograd.Function):
    """Blockwise attention; the backward pass sends the gradients of keys and values round with them."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        borders: list[int],
        group: dist.ProcessGroup,
        scale: float,
    ) -> torch.Tensor:
        size, rank = group.size(), group.rank()
        repeat = query.shape[1] // key.shape[1]
        q_HTD = _heads_first(query, 1)
        out_HTD = torch.zeros_like(q_HTD)
        lse_HT = q_HTD.new_full(q_HTD.shape[:2], float("-inf"))
        k_now, v_now = key.contiguous(), value.contiguous()
        for hop in range(size):
            for pair in _pairs(borders, size, rank, (rank - hop) % size):
                scores = _scores(q_HTD[:, pair.query], _heads_first(k_now[pair.key], repeat), pair.diagonal, scale)
                lse_new = torch.logsumexp(scores, -1)
                part = torch.exp(scores - lse_new[..., None]) @ _heads_first(v_now[pair.key], repeat)
                lse_old = lse_HT[:, pair.query]
                lse = torch.logaddexp(lse_old, lse_new)
                out_HTD[:, pair.query] = (
                    out_HTD[:, pair.query] * torch.exp(lse_old - lse)[..., None]
                    + part * torch.exp(lse_new - lse)[..., None]
                )
                lse_HT[:, pair.query] = lse
            if hop < size - 1:
                k_now, v_now = _pass_on(group, k_now, v_now)
        ctx.save_for_backward(query, key, value, out_HTD, lse_HT)
        ctx.borders, ctx.group, ctx.scale = borders, group, scale
        return out_HTD.transpose(0, 1).to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value, out_HTD, lse_HT = ctx.saved_tensors
        size, rank = ctx.group.size(), ctx.group.rank()
        groups = key.shape[1]
        repeat = query.shape[1] // groups
        grad_HTD = grads[0].float().transpose(0, 1)
        delta_HT = (grad_HTD * out_HTD).sum(-1)
        q_HTD = _heads_first(query, 1)
        dq_HTD = torch.zeros_like(q_HTD)
        k_now, v_now = key.contiguous(), value.contiguous()
        dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
        for hop in range(size):
            for pair in _pairs(ctx.borders, size, rank, (rank - hop) % size):
                q, k = q_HTD[:, pair.query], _heads_first(k_now[pair.key], repeat)
                grad = grad_HTD[:, pair.query]
                p = torch.exp(_scores(q, k, pair.diagonal, ctx.scale) - lse_HT[:, pair.query, None])
                dp = grad @ _heads_first(v_now[pair.key], repeat).transpose(1, 2)
                ds = p * (dp - delta_HT[:, pair.query, None]) * ctx.scale
                dq_HTD[:, pair.query] += ds @ k
                for total, part in ((dk, ds.transpose(1, 2) @ q), (dv, p.transpose(1, 2) @ grad)):
                    summed = part.unflatten(0, (groups, repeat)).sum(1)
                    total[pair.key] += summed.transpose(0, 1)
            if hop < size - 1:
                k_now, v_now, dk, dv = _pass_on(ctx.group, k_now, v_now, dk, dv)
        if size > 1:
            dk, dv = _pass_on(ctx.group, dk, dv)  # one more hop brings them home
        dq = dq_HTD.transpose(0, 1).to(query.dtype)
        return dq, dk.to(key.dtype), dv.to(value.dtype), None, None, None
