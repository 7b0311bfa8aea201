"""Architectures in pytest's own process: read where Megatron-Core may be imported, and sent over."""

import json
from pathlib import Path

from megavlm.config.inputs import InputSpec
from megavlm.models.architecture import Architecture, ExpertsArchitecture, LanguageArchitecture, VisionArchitecture


def read_architecture(hf_dir: Path) -> Architecture:
    """What the tests of the planner need of a tiny model's config."""
    config = json.loads((hf_dir / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    heads = text["num_attention_heads"]
    experts = None
    if "num_experts" in text:
        experts = ExpertsArchitecture(text["num_experts"], text["num_experts_per_tok"], text["moe_intermediate_size"])
    language = LanguageArchitecture(
        num_layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        ffn_hidden_size=text["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=text["num_key_value_heads"],
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        norm_epsilon=1e-6,
        vocab_size=text["vocab_size"],
        max_positions=2048,
        rotary_base=1e4,
        tied_embeddings=False,
        experts=experts,
    )
    clip = config["model_type"] == "llava"
    merge = 1 if clip else vision["spatial_merge_size"]
    temporal = 1 if clip else vision["temporal_patch_size"]
    patch_px = vision["patch_size"]
    windows = vision.get("window_size", 0) // merge // patch_px
    tower = VisionArchitecture(
        num_layers=vision["num_hidden_layers"] if clip else vision["depth"],
        hidden_size=vision["hidden_size"],
        ffn_hidden_size=vision["intermediate_size"],
        num_attention_heads=4,
        activation="gelu",
        norm_epsilon=1e-6,
        patch_channels=3 * temporal * patch_px**2,
        merge_size=merge,
        num_positions=16,
        deepstack_layers=tuple(vision.get("deepstack_visual_indexes", ())),
        class_token=clip,
        gated_mlp=windows > 0,
        window=windows,
        full_attention_layers=tuple(vision.get("fullatt_block_indexes", ())),
        feature_layer=-2 if clip else -1,
    )
    inputs = InputSpec(0, text["vocab_size"], "dynamic", patch_px, temporal, merge, 0, "linear")
    return Architecture(config["model_type"], tower, language, inputs)
