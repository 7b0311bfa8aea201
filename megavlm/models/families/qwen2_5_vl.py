"""Qwen2.5-VL: ViT with window attention and 2-D RoPE, RMSNorm and SwiGLU; Qwen2.5 with chunked multimodal RoPE.

Source: Qwen2.5-VL technical report (arXiv 2502.13923); layouts checked against transformers' qwen2_5_vl.

Shape suffixes: P patches, C patch values, D tower hidden size, V visual tokens, N images, 3 (frames, rows, columns).
"""

from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megavlm.config.inputs import InputSpec
from megavlm.errors import use_error
from megavlm.models.activations import ACTIVATIONS
from megavlm.models.architecture import Architecture, VisionArchitecture
from megavlm.models.decoders import decoder_entries
from megavlm.models.family import ModelFamily
from megavlm.models.projector import Connectors, TwoLayerMLP
from megavlm.models.rope import axial_angles
from megavlm.models.text_config import read_language, rope_settings
from megavlm.models.vision import frame_lengths, pack_params, patch_geometry, run_layers, tower_block
from megavlm.models.weight_map import Entry, direct, flattened, fused_qkv, gated

# What transformers assumes when a config.json leaves a key out.
TEXT_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
}
VISION_DEFAULTS: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 3584,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": (7, 15, 23, 31),
}


def read_config(config: dict[str, Any]) -> Architecture:
    """Read config.json: the hub's, with the language model's keys at the top, or transformers 5's `text_config`."""
    text, vision = config.get("text_config") or config, {**VISION_DEFAULTS, **config["vision_config"]}
    if text.get("use_sliding_window", False):
        raise use_error("config.json use_sliding_window", True, "false", "windowed text attention is not supported")
    section = rope_settings(text).get("mrope_section")
    if section is None:
        raise use_error("config.json rope_scaling", "no mrope_section", "three numbers", "restore the model's config")
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    language = read_language(text, tied, TEXT_DEFAULTS, qkv_bias=True, mrope_section=tuple(section))
    patch_px, temporal, merge = vision["patch_size"], vision["temporal_patch_size"], vision["spatial_merge_size"]
    if vision["window_size"] < patch_px * merge:
        raise use_error(
            "vision_config window_size",
            vision["window_size"],
            f"at least {patch_px * merge} pixels, a visual token",
            "restore the model's config",
        )
    tower = VisionArchitecture(
        num_layers=vision["depth"],
        hidden_size=vision["hidden_size"],
        ffn_hidden_size=vision["intermediate_size"],
        num_attention_heads=vision["num_heads"],
        activation=vision["hidden_act"],
        norm_epsilon=1e-6,
        patch_channels=3 * temporal * patch_px**2,
        merge_size=merge,
        num_positions=0,
        normalization="RMSNorm",
        gated_mlp=True,
        window=vision["window_size"] // merge // patch_px,
        full_attention_layers=tuple(vision["fullatt_block_indexes"]),
    )
    inputs = InputSpec(
        image_token_id=config["image_token_id"],
        vocab_size=language.vocab_size,
        image_kind="dynamic",
        patch_px=patch_px,
        temporal_patch_size=temporal,
        merge_size=merge,
        image_px=0,
        position_kind="mrope",
        video_kind="timed",
        video_token_id=config.get("video_token_id", 151656),
        tokens_per_second=vision.get("tokens_per_second", 4),
    )
    return Architecture("qwen2_5_vl", tower, language, inputs)


def window_order(grid_thw_N3: torch.Tensor, merge_size: int, window: int) -> tuple[torch.Tensor, list[int]]:
    """Visual tokens window by window.

    Args:
        grid_thw_N3: patch grid of every image.
        merge_size: patches of a visual token along each side.
        window: visual tokens of a window along each side; windows at the right and lower edge may be smaller.

    Returns:
        int64 [V], the visual token (row by row, frame by frame) at each place of the windows' order; and the number of
        visual tokens of each window.
    """
    order, lengths, start = [], [], 0
    for frames, patch_rows, patch_columns in grid_thw_N3.tolist():
        rows, columns = patch_rows // merge_size, patch_columns // merge_size
        index = torch.arange(rows * columns).reshape(rows, columns)
        blocks = [block.flatten() for band in index.split(window) for block in band.split(window, dim=1)]
        for _ in range(frames):
            order += [start + block for block in blocks]
            lengths += [len(block) for block in blocks]
            start += rows * columns
    return torch.cat(order).to(grid_thw_N3.device), lengths


class Qwen25Tower(MegatronModule):
    """Patches to the last hidden state [P, D]; or a stage of that.

    Inside, patches are in the windows' order, also between stages.
    """

    def __init__(
        self,
        config: TransformerConfig,
        architecture: VisionArchitecture,
        provider: LocalSpecProvider,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.architecture = architecture
        self.is_first_stage = groups.pp.rank() == 0
        self.is_last_stage = groups.pp.rank() == groups.pp.size() - 1
        if self.is_first_stage:
            self.patch_embed = nn.Linear(
                architecture.patch_channels, architecture.hidden_size, bias=False, dtype=config.params_dtype
            )
        self.block = tower_block(config, provider, groups)

    def forward(self, hiddens: list[torch.Tensor], grid_thw_N3: torch.Tensor) -> list[torch.Tensor]:
        """Encode; attention stays inside windows, in some layers inside frames.

        Args:
            hiddens: the patches [P, C] on the first stage, the hidden state [P, D] elsewhere.
            grid_thw_N3: patch grid of every image.
        """
        vision, merge = self.architecture, self.architecture.merge_size
        order_V, window_lengths = window_order(grid_thw_N3, merge, vision.window)
        within_P = torch.arange(merge**2, device=order_V.device)
        order_P = (order_V[:, None] * merge**2 + within_P).flatten()
        (hidden_PD,) = hiddens
        if self.is_first_stage:
            hidden_PD = self.patch_embed(hidden_PD.to(self.patch_embed.weight.dtype))[order_P]
        geometry = patch_geometry(grid_thw_N3, merge)
        head_dim = vision.hidden_size // vision.num_attention_heads
        angles = axial_angles(geometry.rows_P[order_P], geometry.columns_P[order_P], head_dim)
        frames = pack_params(frame_lengths(grid_thw_N3), hidden_PD.device)
        windows = pack_params([length * merge**2 for length in window_lengths], hidden_PD.device)
        packing = [
            frames if layer.layer_number - 1 in vision.full_attention_layers else windows for layer in self.block.layers
        ]
        last_P1D, _ = run_layers(self.block, hidden_PD[:, None], packing, angles, ())
        last_PD = last_P1D[:, 0]
        return [last_PD[order_P.argsort()] if self.is_last_stage else last_PD]


def build_tower(
    config: TransformerConfig, architecture: Architecture, provider: LocalSpecProvider, groups: ProcessGroupCollection
) -> nn.Module:
    """Build the ViT."""
    return Qwen25Tower(config, architecture.vision, provider, groups)


def build_projector(
    config: TransformerConfig, architecture: Architecture, provider: LocalSpecProvider, groups: ProcessGroupCollection
) -> nn.Module:
    """The merger: RMSNorm, four patches become one, two layers."""
    vision = architecture.vision
    merged = vision.hidden_size * vision.merge_size**2
    sizes = (merged, merged, architecture.language.hidden_size)
    merger = TwoLayerMLP(
        config, provider, groups, sizes, ACTIVATIONS["gelu"], vision.merge_size**2, vision.hidden_size, rms_norm=True
    )
    return Connectors(config, merger, [])


def weight_map(architecture: Architecture) -> list[Entry]:
    """Native names to the names of a Qwen2.5-VL checkpoint on the hub."""
    entries = decoder_entries(architecture.language, "model.", "lm_head.weight")
    inputs = architecture.inputs
    kernel = (3, inputs.temporal_patch_size, inputs.patch_px, inputs.patch_px)
    entries.append(flattened("vision.patch_embed.weight", "visual.patch_embed.proj.weight", kernel))
    for number in range(architecture.vision.num_layers):
        entries += _layer_entries(number, architecture.vision.num_attention_heads)
    entries.append(direct("projector.main.norm.weight", "visual.merger.ln_q.weight"))
    for ours, theirs in (("linear_fc1", "0"), ("linear_fc2", "2")):
        for kind in ("weight", "bias"):
            entries.append(direct(f"projector.main.{ours}.{kind}", f"visual.merger.mlp.{theirs}.{kind}"))
    return entries


def _layer_entries(number: int, num_heads: int) -> list[Entry]:
    ours, theirs = f"vision.block.layers.{number}.", f"visual.blocks.{number}."
    entries = [
        direct(f"{ours}input_layernorm.weight", f"{theirs}norm1.weight"),
        direct(f"{ours}pre_mlp_layernorm.weight", f"{theirs}norm2.weight"),
    ]
    for kind in ("weight", "bias"):
        entries += [
            fused_qkv(f"{ours}self_attention.linear_qkv.{kind}", f"{theirs}attn.qkv.{kind}", num_heads),
            direct(f"{ours}self_attention.linear_proj.{kind}", f"{theirs}attn.proj.{kind}"),
            gated(f"{ours}mlp.linear_fc1.{kind}", f"{theirs}mlp.gate_proj.{kind}", f"{theirs}mlp.up_proj.{kind}"),
            direct(f"{ours}mlp.linear_fc2.{kind}", f"{theirs}mlp.down_proj.{kind}"),
        ]
    return entries


def public_name(name: str) -> str:
    """transformers 5 calls things `model.language_model.`, `model.visual.` in memory; the hub `model.`, `visual.`."""
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    return name


def memory_name(name: str) -> str:
    """Back."""
    if name.startswith("model."):
        return "model.language_model." + name.removeprefix("model.")
    return f"model.{name}" if name.startswith("visual.") else name


FAMILY = ModelFamily(
    model_type="qwen2_5_vl",
    read_config=read_config,
    build_tower=build_tower,
    build_projector=build_projector,
    weight_map=weight_map,
    public_name=public_name,
    memory_name=memory_name,
)
