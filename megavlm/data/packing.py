"""Samples side by side in one packed row.

Shape suffixes: S tokens of one sample, T tokens of the packed row, P patches, C values of a flattened patch,
N images, 3 the (temporal, height, width) axes.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import torch

from megavlm.config.schema import TokenWeights
from megavlm.data.sample import Batch, EncodedSample
from megavlm.data.token_weights import DEFAULT_WEIGHTS


def pack(
    samples: Sequence[EncodedSample],
    patches: Sequence[torch.Tensor] | None,
    *,
    sample_multiple: int,
    total_multiple: int,
    pad_token_id: int,
    patch_channels: int,
    token_weights: TokenWeights = DEFAULT_WEIGHTS,
) -> Batch:
    """Put samples one behind the other; labels and positions never look across a border.

    Args:
        samples: what to pack, in this order.
        patches: float32 [P, C] of every image of every sample, in order; None: leave the pixels out (0 rows), for a
            rank that encodes no image.
        sample_multiple: every sequence is padded to a multiple of this (2 * context parallel size).
        total_multiple: the row is padded to a multiple of this by a segment of its own at the end; itself a multiple
            of sample_multiple.
        pad_token_id: token of the padding, whose weight, label and position are 0.
        patch_channels: C, for a row without images.
        token_weights: of the kinds of tokens.
    """
    assert samples, "a packed row needs a sample"
    assert total_multiple % sample_multiple == 0, (total_multiple, sample_multiple)
    parts = [(sample, part) for sample in samples for part in sample.parts]
    borders = [0]
    for _sample, part in parts:
        borders.append(borders[-1] + _round_up(part.stop - part.start, sample_multiple))
    total = _round_up(borders[-1], total_multiple)
    tokens_T = torch.full((total,), pad_token_id, dtype=torch.int64)
    labels_T = torch.zeros(total, dtype=torch.int64)
    loss_weights_T = torch.zeros(total, dtype=torch.float32)
    position_ids_3T = torch.zeros(3, total, dtype=torch.int64)
    real_T = torch.zeros(total, dtype=torch.bool)
    for (sample, part), start in zip(parts, borders, strict=False):
        tokens = torch.from_numpy(sample.tokens_S[part])
        length = len(tokens)
        tokens_T[start : start + length] = tokens
        real_T[start : start + length] = True
        labels_T[start : start + length - 1] = tokens[1:]
        loss_weights_T[start : start + length - 1] = torch.from_numpy(sample.loss_weights_S(token_weights)[part])[1:]
        position_ids_3T[:, start : start + length] = torch.from_numpy(sample.position_ids_3S[:, part])
    if total > borders[-1]:
        borders.append(total)
    grids = [grid for sample in samples for grid in sample.grids_thw]
    patches_PC = torch.cat(list(patches)) if patches else torch.zeros(0, patch_channels)
    if patches is not None:
        assert patches_PC.shape == (sum(t * rows * columns for t, rows, columns, *_ in grids), patch_channels)
    places_M3, shares_X = _masks(samples, borders)
    return Batch(
        tokens_T=tokens_T,
        labels_T=labels_T,
        loss_weights_T=loss_weights_T,
        position_ids_3T=position_ids_3T,
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        real_T=real_T,
        patches_PC=patches_PC,
        grid_thw_N3=torch.tensor(grids, dtype=torch.int64).reshape(-1, len(grids[0]) if grids else 3),
        sample_ids=tuple(sample.sample_id for sample in samples),
        num_real_tokens=sum(len(sample.tokens_S) for sample in samples),
        pad_token_id=pad_token_id,
        num_parts=len(samples[0].parts),
        feature_rows_V=_feature_rows(samples),
        targets_N=torch.tensor([sample.target for sample in samples], dtype=torch.float32),
        mask_places_M3=places_M3,
        mask_shares_X=shares_X,
    )


def _masks(samples: Sequence[EncodedSample], borders: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the masks of the row are, and what they cover: see `Batch`."""
    places, shares = [], [torch.zeros(0)]
    for sample, start in zip(samples, borders, strict=False):  # of samples of several sequences none has masks
        for mask in sample.masks:
            places.append((start + mask.position, start + mask.start, len(mask.shares_V)))
            shares.append(torch.from_numpy(mask.shares_V))
    return torch.tensor(places, dtype=torch.int64).reshape(-1, 3), torch.cat(shares)


def _feature_rows(samples: Sequence[EncodedSample]) -> torch.Tensor | None:
    """Which feature of the row's images each visual token takes; None: one after the other."""
    rows, start = [], 0
    for sample in samples:
        assert len(sample.parts) == len(samples[0].parts), "rows of one kind are packed together"
        if sample.feature_rows_V is not None:
            rows.append(torch.from_numpy(sample.feature_rows_V) + start)
            start += int(sample.feature_rows_V.max()) + 1
    return torch.cat(rows) if rows else None


def part_of(batch: Batch, part: int, image_token_id: int, total_multiple: int) -> Batch:
    """The same row with one sequence of each sample only; images, and what is known of samples, stay.

    Args:
        batch: whose samples are several sequences.
        part: number of the sequence in its sample.
        image_token_id: of visual tokens.
        total_multiple: see `pack`.
    """
    borders, num_samples = batch.cu_seqlens.tolist(), len(batch.sample_ids)
    spans = [(borders[at], borders[at + 1]) for at in range(part, num_samples * batch.num_parts, batch.num_parts)]
    kept_T = torch.cat([torch.arange(start, end) for start, end in spans])
    starts = [0, *itertools.accumulate(end - start for start, end in spans)]
    rows_V = batch.feature_rows_V
    if rows_V is not None:
        keeps_T = torch.zeros(len(batch.tokens_T), dtype=torch.bool)
        keeps_T[kept_T] = True
        rows_V = rows_V[keeps_T[batch.tokens_T == image_token_id]]
    cut = dataclasses.replace(
        batch,
        tokens_T=batch.tokens_T[kept_T],
        labels_T=batch.labels_T[kept_T],
        loss_weights_T=batch.loss_weights_T[kept_T],
        position_ids_3T=batch.position_ids_3T[:, kept_T],
        real_T=batch.real_T[kept_T],
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        feature_rows_V=rows_V,
        num_parts=1,
    )
    cut.num_real_tokens = int(cut.real_T.sum())
    return pad_to(cut, _round_up(starts[-1], total_multiple))


def add_sequences(
    batch: Batch,
    sequences: Sequence[EncodedSample],
    samples: Sequence[int],
    image_token_id: int,
    *,
    sample_multiple: int,
    total_multiple: int,
) -> Batch:
    """The same row with further sequences behind those of its samples; its images stay.

    Args:
        batch: whose visual tokens say which features they take.
        sequences: what is added, in this order.
        samples: for each the number of the sample of the row whose first sequence shows the same images.
        image_token_id: of visual tokens.
        sample_multiple: see `pack`.
        total_multiple: see `pack`.
    """
    assert batch.feature_rows_V is not None
    num_sequences = len(batch.sample_ids) * batch.num_parts
    more = pack(
        sequences,
        None,
        sample_multiple=sample_multiple,
        total_multiple=sample_multiple,
        pad_token_id=batch.pad_token_id,
        patch_channels=batch.patches_PC.shape[1],
    )
    end = int(batch.cu_seqlens[num_sequences])
    rows_each = batch.feature_rows_V.split(_num_visual(batch.tokens_T, batch.cu_seqlens, image_token_id))
    rows = [rows_each[sample * batch.num_parts] for sample in samples]
    assert [len(one) for one in rows] == _num_visual(more.tokens_T, more.cu_seqlens, image_token_id)[: len(rows)]
    longer = dataclasses.replace(
        batch,
        tokens_T=torch.cat((batch.tokens_T[:end], more.tokens_T)),
        labels_T=torch.cat((batch.labels_T[:end], more.labels_T)),
        loss_weights_T=torch.cat((batch.loss_weights_T[:end], more.loss_weights_T)),
        position_ids_3T=torch.cat((batch.position_ids_3T[:, :end], more.position_ids_3T), dim=1),
        real_T=torch.cat((batch.real_T[:end], more.real_T)),
        cu_seqlens=torch.cat((batch.cu_seqlens[: num_sequences + 1], end + more.cu_seqlens[1:])),
        feature_rows_V=torch.cat((batch.feature_rows_V, *rows)),
        num_real_tokens=batch.num_real_tokens + more.num_real_tokens,
    )
    return pad_to(longer, _round_up(len(longer.tokens_T), total_multiple))


def _num_visual(tokens_T: torch.Tensor, cu_seqlens: torch.Tensor, image_token_id: int) -> list[int]:
    """Visual tokens of each sequence of a packed row, padding included."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    return [int((part == image_token_id).sum()) for part in tokens_T.split(lengths)]


def pad_to(batch: Batch, total: int) -> Batch:
    """The same row with a further padding segment at its end, so that it has `total` tokens.

    Interleaved pipeline schedules need rows of one length. The result shares the patches.
    """
    missing = total - len(batch.tokens_T)
    assert missing >= 0, (total, len(batch.tokens_T))
    if not missing:
        return batch
    pad = torch.nn.functional.pad
    return dataclasses.replace(
        batch,
        tokens_T=pad(batch.tokens_T, (0, missing), value=batch.pad_token_id),
        labels_T=pad(batch.labels_T, (0, missing)),
        loss_weights_T=pad(batch.loss_weights_T, (0, missing)),
        position_ids_3T=pad(batch.position_ids_3T, (0, missing)),
        real_T=pad(batch.real_T, (0, missing)),
        cu_seqlens=torch.cat((batch.cu_seqlens, batch.cu_seqlens.new_tensor([total]))),
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
