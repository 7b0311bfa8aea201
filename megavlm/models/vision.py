"""Pieces that vision towers share: geometry of patches, packing of images, running layers with taps.

Shape suffixes: P patches of all images of a batch, C values of a patch, D hidden size, N images, 3 (frames, rows,
columns). Patches come in merge-block order: the merge_size^2 patches of one visual token are neighbours.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import get_fp8_align_size, get_fp8_context
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.models.recompute import ready_for_recompute
from megavlm.models.specs import layer_spec, without_bias


@dataclass(frozen=True)
class PatchGeometry:
    """Where every patch of a batch lies: its row and column, and the height and width of its image, in patches."""

    rows_P: torch.Tensor
    columns_P: torch.Tensor
    heights_P: torch.Tensor
    widths_P: torch.Tensor


def patch_geometry(grid_thw_N3: torch.Tensor, merge_size: int) -> PatchGeometry:
    """Row and column of each patch, in merge-block order, frame after frame."""
    rows, columns, heights, widths = [], [], [], []
    for frames, height, width, *_ in grid_thw_N3.tolist():
        blocks = (height // merge_size, merge_size, width // merge_size, merge_size)
        row = torch.arange(height)[:, None].expand(height, width).reshape(blocks).transpose(1, 2).flatten()
        column = torch.arange(width)[None, :].expand(height, width).reshape(blocks).transpose(1, 2).flatten()
        rows.append(row.repeat(frames))
        columns.append(column.repeat(frames))
        heights.append(torch.full((frames * height * width,), height))
        widths.append(torch.full((frames * height * width,), width))
    device = grid_thw_N3.device
    return PatchGeometry(*(torch.cat(part).to(device) for part in (rows, columns, heights, widths)))


def pack_params(lengths: Sequence[int], device: torch.device) -> PackedSeqParams:
    """Megatron-Core's description of a packed row of segments with these lengths."""
    borders = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=device)
    borders[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
    longest = max(lengths)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def frame_lengths(grid_thw_N3: torch.Tensor) -> list[int]:
    """Patches of each frame: the segments of per-image attention."""
    return [rows * columns for frames, rows, columns, *_ in grid_thw_N3.tolist() for _ in range(frames)]


def interpolate_positions(table_RD: torch.Tensor, side: int, geometry: PatchGeometry) -> torch.Tensor:
    """Bilinear samples (corners aligned) of a learned side x side position table, at every patch.

    Returns:
        [P, D]: in fp32 arithmetic, dtype of the table.
    """

    def axis(position_P: torch.Tensor, extent_P: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        spread = (side - 1) / (extent_P - 1).clamp(min=1).float()
        at = position_P.float() * spread
        low = at.floor().long().clamp(max=side - 1)
        return low, (low + 1).clamp(max=side - 1), at - low

    top, bottom, down = axis(geometry.rows_P, geometry.heights_P)
    left, right, along = axis(geometry.columns_P, geometry.widths_P)
    corners = (
        (top, left, (1 - down) * (1 - along)),
        (top, right, (1 - down) * along),
        (bottom, left, down * (1 - along)),
        (bottom, right, down * along),
    )
    total = sum(
        torch.nn.functional.embedding(row * side + column, table_RD) * weight[:, None]
        for row, column, weight in corners
    )
    assert isinstance(total, torch.Tensor)
    return total.to(table_RD.dtype)


def tower_block(
    config: TransformerConfig,
    provider: LocalSpecProvider,
    groups: ProcessGroupCollection,
    join: ModuleSpec | None = None,
    qk_norm: ModuleSpec | None = None,
) -> TransformerBlock:
    """The layers of a tower that this stage holds (all of them, unless `config` has a pipeline).

    Args:
        config: of the encoder.
        provider: where modules come from.
        groups: of the encoder.
        join: what adds a branch to the residual, for towers that do more than add.
        qk_norm: what normalises queries and keys, each with weights of its own.
    """
    spec = layer_spec(provider, AttnMaskType.no_mask)
    if join is not None:
        spec.submodules.self_attn_bda = spec.submodules.mlp_bda = join
    attention = spec.submodules.self_attention.submodules
    if qk_norm is not None:
        attention.q_layernorm = attention.k_layernorm = qk_norm
    if not config.add_qkv_bias:
        attention.linear_qkv = without_bias(attention.linear_qkv)
    num_layers = get_num_layers_to_build(config, vp_stage=None, pp_rank=groups.pp.rank())
    return TransformerBlock(
        config,
        TransformerBlockSubmodules([spec] * num_layers, layer_norm=provider.layer_norm()),
        post_layer_norm=False,
        post_process=False,
        pg_collection=groups,
    )


def run_layers(
    block: TransformerBlock,
    hidden_P1D: torch.Tensor,
    packing: Sequence[PackedSeqParams],
    angles: torch.Tensor | None,
    taps: Sequence[int],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run a tower's layers, keeping the outputs of some.

    Args:
        block: the tower's layers; its full recompute setting is honoured.
        hidden_P1D: input of the first layer.
        packing: attention segments of each of these layers.
        angles: rotary angles, or None.
        taps: layers of the whole tower (from 0) whose outputs to keep; those of other stages are passed over.

    Returns:
        The last hidden state [P, 1, D], and the kept ones in the order of `taps`.
    """
    recompute = block.config.recompute_granularity == "full" and block.training
    # As in TransformerBlock.forward: with delayed scales one context for all layers, else one each.
    is_delayed = bool(block.config.fp8) and block.config.fp8_recipe == Fp8Recipe.delayed
    hidden_P1D = ready_for_recompute(hidden_P1D, block)
    num_patches = len(hidden_P1D)
    if block.config.fp8:
        multiple = get_fp8_align_size(block.config.fp8_recipe)
        hidden_P1D, packing, angles = _filled_up(hidden_P1D, packing, angles, multiple)
    kept: dict[int, torch.Tensor] = {}
    with get_fp8_context(block.config) if is_delayed else contextlib.nullcontext():
        for local_number, layer in enumerate(block.layers):

            def run(hidden: torch.Tensor, layer: torch.nn.Module = layer, index: int = local_number) -> torch.Tensor:
                number: Any = layer.layer_number
                with contextlib.nullcontext() if is_delayed else get_fp8_context(block.config, number - 1):
                    output, _ = layer(
                        hidden_states=hidden,
                        attention_mask=None,
                        rotary_pos_emb=angles,
                        packed_seq_params=packing[index],
                    )
                return output

            hidden_P1D = tensor_parallel.checkpoint(run, False, hidden_P1D) if recompute else run(hidden_P1D)
            if layer.layer_number - 1 in taps:
                kept[layer.layer_number - 1] = hidden_P1D[:num_patches]
    return hidden_P1D[:num_patches], [kept[number] for number in taps if number in kept]


def _filled_up(
    hidden_P1D: torch.Tensor, packing: Sequence[PackedSeqParams], angles: torch.Tensor | None, multiple: int
) -> tuple[torch.Tensor, list[PackedSeqParams], torch.Tensor | None]:
    """Patches with zeros behind them, which are an attention segment of their own: FP8 products take whole blocks."""
    missing = -len(hidden_P1D) % multiple
    if not missing:
        return hidden_P1D, list(packing), angles
    hidden_P1D = torch.nn.functional.pad(hidden_P1D, (0, 0, 0, 0, 0, missing))
    if angles is not None:
        angles = torch.nn.functional.pad(angles, (0, 0, 0, 0, 0, 0, 0, missing))
    filled = {id(one): pack_params([*one.cu_seqlens_q.diff().tolist(), missing], hidden_P1D.device) for one in packing}
    return hidden_P1D, [filled[id(one)] for one in packing], angles
