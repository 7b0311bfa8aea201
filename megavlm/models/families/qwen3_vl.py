"""Qwen3-VL: ViT with resampled positions and 2-D RoPE, DeepStack, interleaved multimodal RoPE.

Source: Qwen3-VL technical report (arXiv 2511.21631); layouts checked against transformers' qwen3_vl.

Shape suffixes: P patches, C patch values, D tower hidden size, N images, 3 (frames, rows, columns).
"""

from collections.abc import Callable
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
from megavlm.models.family import ModelFamily
from megavlm.models.projector import Connectors, TwoLayerMLP
from megavlm.models.rope import axial_angles
from megavlm.models.text_config import read_language, rope_settings
from megavlm.models.vision import (
    frame_lengths,
    interpolate_positions,
    pack_params,
    patch_geometry,
    run_layers,
    tower_block,
)
from megavlm.models.weight_map import Entry, direct, flattened, fused_qkv, gated_mlp_entries, language_entries

# What transformers assumes when a config.json leaves a key out.
TEXT_DEFAULTS: dict[str, Any] = {
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128000,
    "rope_theta": 500000.0,
}


def read_config(config: dict[str, Any]) -> Architecture:
    """Read config.json; both the hub's `rope_scaling` spelling and `rope_parameters` are understood."""
    text, vision = config["text_config"], config["vision_config"]
    language = read_language(
        text,
        config.get("tie_word_embeddings", False),
        TEXT_DEFAULTS,
        qk_norm=True,
        qkv_bias=text.get("attention_bias", False),
        mrope_section=tuple(rope_settings(text).get("mrope_section", (24, 20, 20))),
        mrope_interleaved=True,
    )
    patch_px, temporal = vision.get("patch_size", 16), vision.get("temporal_patch_size", 2)
    merge = vision.get("spatial_merge_size", 2)
    tower = VisionArchitecture(
        num_layers=vision["depth"],
        hidden_size=vision["hidden_size"],
        ffn_hidden_size=vision["intermediate_size"],
        num_attention_heads=vision["num_heads"],
        activation=vision.get("hidden_act", "gelu_pytorch_tanh"),
        norm_epsilon=1e-6,
        patch_channels=3 * temporal * patch_px**2,
        merge_size=merge,
        num_positions=vision.get("num_position_embeddings", 2304),
        patch_bias=True,
        deepstack_layers=tuple(vision.get("deepstack_visual_indexes", (8, 16, 24))),
    )
    if len(tower.deepstack_layers) > language.num_layers:
        raise use_error(
            "config.json deepstack_visual_indexes",
            f"{len(tower.deepstack_layers)} layers",
            f"at most {language.num_layers}, the language model's layers, which add one each",
            "name fewer layers",
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
        video_kind="stamped",
        video_token_id=config.get("video_token_id", 151656),
        frame_border_ids=(config.get("vision_start_token_id", 151652), config.get("vision_end_token_id", 151653)),
    )
    return Architecture("qwen3_vl", tower, language, inputs)


class Qwen3Tower(MegatronModule):
    """Patches to hidden states: the last one, then one per DeepStack layer, each [P, D]; or a stage of that."""

    def __init__(
        self,
        config: TransformerConfig,
        architecture: VisionArchitecture,
        provider: LocalSpecProvider,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.architecture = architecture
        self.side = int(architecture.num_positions**0.5)
        self.is_first_stage = groups.pp.rank() == 0
        dtype = config.params_dtype
        if self.is_first_stage:
            self.patch_embed = nn.Linear(architecture.patch_channels, architecture.hidden_size, dtype=dtype)
            self.position_table = nn.Embedding(architecture.num_positions, architecture.hidden_size, dtype=dtype)
        self.block = tower_block(config, provider, groups)

    def forward(self, hiddens: list[torch.Tensor], grid_thw_N3: torch.Tensor) -> list[torch.Tensor]:
        """Encode; attention stays inside each frame.

        Args:
            hiddens: the patches [P, C] on the first stage; the last hidden state [P, D] and the taps so far elsewhere.
            grid_thw_N3: patch grid of every image.
        """
        vision = self.architecture
        geometry = patch_geometry(grid_thw_N3, vision.merge_size)
        hidden_PD, *earlier = hiddens
        if self.is_first_stage:
            hidden_PD = self.patch_embed(hidden_PD.to(self.patch_embed.weight.dtype))
            hidden_PD = hidden_PD + interpolate_positions(self.position_table.weight, self.side, geometry)
        angles = axial_angles(geometry.rows_P, geometry.columns_P, vision.hidden_size // vision.num_attention_heads)
        packing = pack_params(frame_lengths(grid_thw_N3), hidden_PD.device)
        last, taps = run_layers(
            self.block, hidden_PD[:, None], [packing] * len(self.block.layers), angles, vision.deepstack_layers
        )
        return [last[:, 0], *earlier, *(tap[:, 0] for tap in taps)]


def build_tower(
    config: TransformerConfig, architecture: Architecture, provider: LocalSpecProvider, groups: ProcessGroupCollection
) -> nn.Module:
    """Build the ViT."""
    return Qwen3Tower(config, architecture.vision, provider, groups)


def build_projector(
    config: TransformerConfig, architecture: Architecture, provider: LocalSpecProvider, groups: ProcessGroupCollection
) -> nn.Module:
    """The merger norms before it merges; the DeepStack mergers norm after."""
    vision = architecture.vision
    merged = vision.hidden_size * vision.merge_size**2
    sizes = (merged, merged, architecture.language.hidden_size)

    def merger(norm_size: int) -> TwoLayerMLP:
        return TwoLayerMLP(config, provider, groups, sizes, ACTIVATIONS["gelu"], vision.merge_size**2, norm_size)

    return Connectors(config, merger(vision.hidden_size), [merger(merged) for _ in vision.deepstack_layers])


def weight_map(architecture: Architecture) -> list[Entry]:
    """Native names to the names in a Qwen3-VL checkpoint."""
    return map_with(architecture, gated_mlp_entries)


def map_with(architecture: Architecture, mlp_entries: Callable[[str, str], list[Entry]]) -> list[Entry]:
    """The same with another MLP in the language model's layers."""
    language, vision = architecture.language, architecture.vision
    entries = language_entries(
        language.num_layers,
        language.num_query_groups,
        language.head_dim,
        "model.language_model.",
        language.qk_norm,
        language.qkv_bias,
        mlp_entries,
    )
    if not language.tied_embeddings:
        entries.append(direct("language.output_layer.weight", "lm_head.weight"))
    inputs = architecture.inputs
    kernel = (3, inputs.temporal_patch_size, inputs.patch_px, inputs.patch_px)
    entries += [
        flattened("vision.patch_embed.weight", "model.visual.patch_embed.proj.weight", kernel),
        direct("vision.patch_embed.bias", "model.visual.patch_embed.proj.bias"),
        direct("vision.position_table.weight", "model.visual.pos_embed.weight"),
    ]
    for number in range(vision.num_layers):
        entries += _layer_entries(number, vision.num_attention_heads)
    connectors = [("projector.main.", "model.visual.merger.")]
    for number in range(len(vision.deepstack_layers)):
        connectors.append((f"projector.deepstack.{number}.", f"model.visual.deepstack_merger_list.{number}."))
    for ours, theirs in connectors:
        for part in ("norm", "linear_fc1", "linear_fc2"):
            entries += [direct(f"{ours}{part}.{kind}", f"{theirs}{part}.{kind}") for kind in ("weight", "bias")]
    return entries


def _layer_entries(number: int, num_heads: int) -> list[Entry]:
    ours, theirs = f"vision.block.layers.{number}.", f"model.visual.blocks.{number}."
    names = {
        "input_layernorm": "norm1",
        "pre_mlp_layernorm": "norm2",
        "self_attention.linear_proj": "attn.proj",
        "mlp.linear_fc1": "mlp.linear_fc1",
        "mlp.linear_fc2": "mlp.linear_fc2",
    }
    entries = []
    for kind in ("weight", "bias"):
        entries.append(fused_qkv(f"{ours}self_attention.linear_qkv.{kind}", f"{theirs}attn.qkv.{kind}", num_heads))
        entries += [direct(f"{ours}{a}.{kind}", f"{theirs}{b}.{kind}") for a, b in names.items()]
    return entries


FAMILY = ModelFamily(
    model_type="qwen3_vl",
    read_config=read_config,
    build_tower=build_tower,
    build_projector=build_projector,
    weight_map=weight_map,
    public_name=lambda name: name,
    memory_name=lambda name: name,
)
