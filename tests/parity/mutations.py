"""Mistakes made on purpose, one at a time: each replaces something of ours while a model is built and run.

They are what a rewrite of that part could plausibly get wrong. Used in the workers only: imports megatron when a
mutation is entered, never before.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

Patches = list[Any]


@contextlib.contextmanager
def mutation(name: str) -> Iterator[None]:
    """Break one thing while inside; the empty name breaks nothing."""
    with contextlib.ExitStack() as stack:
        for replacement in MUTATIONS[name]() if name else []:
            stack.enter_context(replacement)
        yield


def _deepstack_late() -> Patches:
    from megavlm.models import chunk

    def one_slot_more(*args: Any, **kwargs: Any) -> torch.Tensor:
        hidden_TKH = merge_features(*args, **kwargs)
        empty = torch.zeros_like(hidden_TKH[:, :1])
        return torch.cat((hidden_TKH[:, :1], empty, hidden_TKH[:, 1:]), dim=1)

    merge_features = chunk.merge_features
    return [patch.object(chunk, "merge_features", one_slot_more)]


def _gate_up_swapped() -> Patches:
    from megavlm.models import weight_map

    gated = weight_map.gated
    return [patch.object(weight_map, "gated", lambda native, gate, up: gated(native, up, gate))]


def _mrope_interleaved(value: bool) -> Patches:
    from megavlm.models import language

    def changed(size: Any, base: Any, section: Any, _: bool, *rest: Any) -> Any:
        return real(size, base, section, value, *rest)

    real = language.RotaryAngles
    return [patch.object(language, "RotaryAngles", changed)]


def _joined_from(change: Callable[[torch.Tensor, Any], torch.Tensor]) -> Patches:
    """Joined tiles [rows, columns, H] are replaced by something else before they are cut."""
    from megavlm.models.anyres import AnyresConnector

    def joined(self: Any, image_PH: torch.Tensor, grid: Any) -> torch.Tensor:
        frames, side, columns = grid[0], grid[1], grid[3]
        if frames == 1:
            return real(self, image_PH, grid)
        tiles = image_PH[side**2 :].unflatten(0, (-1, columns, side, side)).transpose(1, 2)
        changed_RCH = change(tiles.flatten(2, 3).flatten(0, 1), grid)
        back = changed_RCH.unflatten(0, (-1, side)).unflatten(2, (-1, side)).transpose(1, 2).flatten(0, 3)
        return real(self, torch.cat((image_PH[: side**2], back)), grid)

    real = AnyresConnector._joined
    return [patch.object(AnyresConnector, "_joined", joined)]


def _tiles_one_after_another() -> Patches:
    """The first line holds the first tile's patches, and so on."""

    def unordered(joined_RCH: torch.Tensor, grid: Any) -> torch.Tensor:
        side, columns = grid[1], grid[3]
        tiles = joined_RCH.unflatten(0, (-1, side)).unflatten(2, (columns, side)).transpose(1, 2)
        return tiles.reshape(joined_RCH.shape)

    return _joined_from(unordered)


def _padding_at_one_side() -> Patches:
    """The image is taken from the upper left corner, not from the middle."""

    def moved(joined_RCH: torch.Tensor, grid: Any) -> torch.Tensor:
        top, left = (joined_RCH.shape[0] - grid[4]) // 2, (joined_RCH.shape[1] - grid[5]) // 2
        return torch.roll(joined_RCH, (top, left), dims=(0, 1))

    return _joined_from(moved)


def _nearest_neighbours() -> Patches:
    from megavlm.models import anyres

    def nearest(tensor: torch.Tensor, size: Any, mode: str) -> torch.Tensor:
        assert mode == "bilinear"
        return real(tensor, size)

    real = F.interpolate
    return [patch.object(anyres.F, "interpolate", nearest)]


def _softmax_over_all_experts() -> Patches:
    from megavlm.models import build

    experts = build._experts
    return [patch.object(build, "_experts", lambda *args: experts(*args) | {"moe_router_pre_softmax": True})]


def _expert_halves_swapped() -> Patches:
    from megavlm.models.families import qwen3_vl_moe

    def swapped(native: str, name: str, num_inputs: int, halves: bool) -> Any:
        entry = real(native, name, num_inputs, halves)
        if not halves:
            return entry
        return dataclasses.replace(
            entry, to_native=lambda tensors: torch.cat(entry.to_native(tensors).chunk(2, dim=1)[::-1], dim=1)
        )

    real = qwen3_vl_moe.transposed_experts
    return [patch.object(qwen3_vl_moe, "transposed_experts", swapped)]


def _no_windows() -> Patches:
    from megavlm.models.families import qwen2_5_vl

    def whole_frames(grid_thw_N3: torch.Tensor, merge_size: int, _: int) -> Any:
        return window_order(grid_thw_N3, merge_size, int(grid_thw_N3.max()))

    window_order = qwen2_5_vl.window_order
    return [patch.object(qwen2_5_vl, "window_order", whole_frames)]


def _windows_everywhere() -> Patches:
    from megavlm.models.families import qwen2_5_vl

    def without(*args: Any, **kwargs: Any) -> Any:
        return vision(*args, **{**kwargs, "full_attention_layers": ()})

    vision = qwen2_5_vl.VisionArchitecture
    return [patch.object(qwen2_5_vl, "VisionArchitecture", without)]


def _window_order_kept() -> Patches:
    from megavlm.models.families import qwen2_5_vl

    def kept(self: Any, hiddens: Any, grid_thw_N3: torch.Tensor) -> Any:
        vision = self.architecture
        order_V, _ = qwen2_5_vl.window_order(grid_thw_N3, vision.merge_size, vision.window)
        (hidden_PD,) = forward(self, hiddens, grid_thw_N3)
        return [hidden_PD.unflatten(0, (-1, vision.merge_size**2))[order_V].flatten(0, 1)]

    forward = qwen2_5_vl.Qwen25Tower.forward
    return [patch.object(qwen2_5_vl.Qwen25Tower, "forward", kept)]


def _no_layer_scale() -> Patches:
    from megavlm.models.square_tower import ScaledResidual

    def plain(self: Any, _training: bool, _fused: bool) -> Any:
        return lambda branch, residual, _: residual + branch[0] + branch[1] + 0 * self.scale

    return [patch.object(ScaledResidual, "forward", plain)]


def _columns_first() -> Patches:
    """Pixel shuffle with rows and columns of a block exchanged."""
    from megavlm.models import projector

    def swapped(self: Any, *args: Any) -> None:
        init(self, *args)
        self.order = self.order.unflatten(0, (-1, 2, 2)).transpose(1, 2).flatten()

    init = projector.PixelShuffleMLP.__init__
    return [patch.object(projector.PixelShuffleMLP, "__init__", swapped)]


def _heads_normalised_alone() -> Patches:
    from megavlm.models.norm import AllHeadsNorm

    def each(self: Any, heads: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(heads, heads.shape[-1:], None, self.epsilon) * self.weight.view(heads.shape[-2:])

    return [patch.object(AllHeadsNorm, "forward", each)]


def _query_and_key_norms_swapped() -> Patches:
    from megavlm.models.families import internvl

    def swapped(native: str, name: str) -> Any:
        return direct(native, name.translate(str.maketrans("qk", "kq")) if name.endswith("_norm.weight") else name)

    direct = internvl.direct
    return [patch.object(internvl, "direct", swapped)]


def _one_vision_segment() -> Patches:
    from megavlm.models import square_tower
    from megavlm.models.families import qwen2_5_vl, qwen3_vl

    def whole(lengths: Any, device: torch.device) -> Any:
        return pack_params([sum(lengths)], device)

    pack_params = qwen3_vl.pack_params
    return [patch.object(family, "pack_params", whole) for family in (square_tower, qwen2_5_vl, qwen3_vl)]


def _one_language_segment() -> Patches:
    from megavlm.models import chunk

    def whole(cu_seqlens_q: torch.Tensor, cu_seqlens_kv: torch.Tensor, **kwargs: Any) -> Any:
        borders = cu_seqlens_q[[0, -1]]
        return packed_seq_params(cu_seqlens_q=borders, cu_seqlens_kv=borders, **kwargs)

    packed_seq_params = chunk.PackedSeqParams
    return [patch.object(chunk, "PackedSeqParams", whole)]


def _exact_gelu() -> Patches:
    from megavlm.models.activations import ACTIVATIONS

    return [patch.dict(ACTIVATIONS, gelu_pytorch_tanh=F.gelu)]


def _tanh_gelu() -> Patches:
    from megavlm.models.activations import ACTIVATIONS, gelu_tanh

    return [patch.dict(ACTIVATIONS, gelu=gelu_tanh)]


def _slow_gelu() -> Patches:
    from megavlm.models.activations import ACTIVATIONS

    return [patch.dict(ACTIVATIONS, quick_gelu=F.gelu)]


def _other_epsilon() -> Patches:
    from megavlm.train import parts

    def changed(*args: Any) -> Any:
        return dataclasses.replace(transformer_config(*args), layernorm_epsilon=1e-5)

    transformer_config = parts.transformer_config
    return [patch.object(parts, "transformer_config", changed)]


def _plain_language_qkv() -> Patches:
    from megavlm.models import weight_map

    def plain(native: str, names: tuple[str, str, str], num_groups: int, head_dim: int) -> Any:
        return dataclasses.replace(split_qkv(native, names, num_groups, head_dim), to_native=torch.cat)

    split_qkv = weight_map.split_qkv
    return [patch.object(weight_map, "split_qkv", plain)]


def _plain_vision_qkv() -> Patches:
    from megavlm.models.families import qwen3_vl

    return [patch.object(qwen3_vl, "fused_qkv", lambda native, name, _: qwen3_vl.direct(native, name))]


def _causal_vision() -> Patches:
    from megatron.core.transformer.enums import AttnMaskType

    from megavlm.models import vision

    layer_spec = vision.layer_spec
    return [patch.object(vision, "layer_spec", lambda provider, _: layer_spec(provider, AttnMaskType.causal))]


def _no_loss_mask() -> Patches:
    from megavlm.train.stages import sft

    cross_entropy = sft.cross_entropy
    return [
        patch.object(
            sft,
            "cross_entropy",
            lambda logits, labels, weights, group: cross_entropy(logits, labels, torch.ones_like(weights), group),
        )
    ]


def _microbatch_means() -> Patches:
    """Each microbatch is divided by its own count, then their number is what is divided by."""
    from megavlm.train.stages import sft

    def mean(*args: Any) -> Any:
        loss_sum, count, metrics = cross_entropy(*args)
        return loss_sum / count, torch.ones_like(count), metrics

    cross_entropy = sft.cross_entropy
    return [patch.object(sft, "cross_entropy", mean)]


def _local_count() -> Patches:
    """Each data rank divides by the count of its own tokens, times the number of ranks."""
    import torch.distributed as dist

    from megavlm.train import step

    def local_sums(local: torch.Tensor, _counts: bool) -> torch.Tensor:
        return local * dist.get_world_size()

    return [patch.object(step, "global_sums", local_sums)]


MUTATIONS: dict[str, Callable[[], Patches]] = {
    "DeepStack one layer late": _deepstack_late,
    "gate and up swapped": _gate_up_swapped,
    "chunked MRoPE": lambda: _mrope_interleaved(False),
    "interleaved MRoPE": lambda: _mrope_interleaved(True),
    "full attention in every layer of the tower": _no_windows,
    "windows in every layer of the tower": _windows_everywhere,
    "experts' weights do not add up to 1": _softmax_over_all_experts,
    "experts' gate and up swapped": _expert_halves_swapped,
    "tiles not joined line by line": _tiles_one_after_another,
    "padding of tiles kept in place": _padding_at_one_side,
    "joined tiles shrunk by nearest neighbours": _nearest_neighbours,
    "no LayerScale": _no_layer_scale,
    "pixel shuffle column by column": _columns_first,
    "query and key normalised head by head": _heads_normalised_alone,
    "norms of query and key swapped": _query_and_key_norms_swapped,
    "windows' order not undone": _window_order_kept,
    "all images one attention segment": _one_vision_segment,
    "packed row one attention segment": _one_language_segment,
    "erf for tanh GELU in the tower": _exact_gelu,
    "tanh for erf GELU in the connector": _tanh_gelu,
    "erf for quick GELU": _slow_gelu,
    "RMSNorm epsilon 1e-5 for 1e-6": _other_epsilon,
    "plain q/k/v concatenation, language": _plain_language_qkv,
    "plain q/k/v concatenation, vision": _plain_vision_qkv,
    "causal vision tower": _causal_vision,
    "no loss mask": _no_loss_mask,
    "microbatches divided one by one": _microbatch_means,
    "local token count": _local_count,
}
