"""CLIP and SigLIP towers: their configs, tensors that are carried along, and weight map.

Sources: CLIP, arXiv 2103.00020; SigLIP, arXiv 2303.15343; checked against transformers.
"""

from collections.abc import Mapping
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megavlm.config.inputs import InputSpec
from megavlm.errors import use_error
from megavlm.models.architecture import Architecture, VisionArchitecture
from megavlm.models.square_tower import SquareTower
from megavlm.models.weight_map import Entry, direct, flattened, split_qkv

# What transformers assumes when a config.json leaves a key out, as those on the hub do; LLaVA's, for CLIP.
DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "siglip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "vision_use_head": True,
    },
}
TOWER = "vision_tower.vision_model."


def read_tower(vision: Mapping[str, Any], feature_layer: Any) -> VisionArchitecture:
    """Read a `vision_config`.

    Args:
        vision: the config.
        feature_layer: which hidden state is the feature, counted from the end.

    Raises:
        UseError: neither CLIP nor SigLIP, or a feature layer that is none.
    """
    kind = vision.get("model_type", "clip_vision_model")
    if kind not in DEFAULTS:
        raise use_error("vision_config model_type", kind, f"one of {', '.join(DEFAULTS)}", "use such a tower")
    is_clip = kind == "clip_vision_model"
    vision = {**DEFAULTS[kind], **vision}
    if not isinstance(feature_layer, int) or not -vision["num_hidden_layers"] <= feature_layer < 0:
        raise use_error(
            "config.json vision_feature_layer",
            feature_layer,
            f"a number from -{vision['num_hidden_layers']} to -1",
            "several feature layers, and those counted from the front, are not supported",
        )
    patch_px, image_px = vision["patch_size"], vision["image_size"]
    return VisionArchitecture(
        num_layers=vision["num_hidden_layers"],
        hidden_size=vision["hidden_size"],
        ffn_hidden_size=vision["intermediate_size"],
        num_attention_heads=vision["num_attention_heads"],
        activation=vision["hidden_act"],
        norm_epsilon=vision["layer_norm_eps"],
        patch_channels=3 * patch_px**2,
        merge_size=1,
        num_positions=(image_px // patch_px) ** 2,
        feature_layer=feature_layer,
        class_token=is_clip,
        pre_norm=is_clip,
        patch_bias=not is_clip,
        carries_final_norm=True,
        carries_head=not is_clip and vision["vision_use_head"],
    )


def input_spec(vision: Mapping[str, Any], image_token_id: int, vocab_size: int) -> InputSpec:
    """Images of the tower's size, one token a patch; CLIP's are cropped, SigLIP's are not."""
    kind = vision.get("model_type", "clip_vision_model")
    vision = {**DEFAULTS[kind], **vision}
    return InputSpec(
        image_token_id=image_token_id,
        vocab_size=vocab_size,
        image_kind="square" if kind == "clip_vision_model" else "resized",
        patch_px=vision["patch_size"],
        temporal_patch_size=1,
        merge_size=1,
        image_px=vision["image_size"],
        position_kind="linear",
    )


def unused_shapes(architecture: VisionArchitecture) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors after the feature layer, by their names on disk with `.` as `__`."""
    size, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    shapes: dict[str, tuple[int, ...]] = _norm("post_layernorm", size)
    computed = architecture.num_computed_layers
    linears = {"self_attn__q_proj": (size, size), "self_attn__k_proj": (size, size), "self_attn__v_proj": (size, size)}
    linears |= {"self_attn__out_proj": (size, size), "mlp__fc1": (ffn, size), "mlp__fc2": (size, ffn)}
    for number in range(computed, architecture.num_layers):
        layer = f"encoder__layers__{number}__"
        for name, shape in linears.items():
            shapes |= {f"{layer}{name}__weight": shape, f"{layer}{name}__bias": shape[:1]}
        shapes |= _norm(f"{layer}layer_norm1", size) | _norm(f"{layer}layer_norm2", size)
    if architecture.carries_head:
        attention = {"in_proj_weight": (3 * size, size), "in_proj_bias": (3 * size,)}
        attention |= {"out_proj__weight": (size, size), "out_proj__bias": (size,)}
        shapes |= {"head__probe": (1, 1, size), **_norm("head__layernorm", size)}
        shapes |= {f"head__attention__{name}": shape for name, shape in attention.items()}
        shapes |= {"head__mlp__fc1__weight": (ffn, size), "head__mlp__fc1__bias": (ffn,)}
        shapes |= {"head__mlp__fc2__weight": (size, ffn), "head__mlp__fc2__bias": (size,)}
    return shapes


def _norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}__weight": (size,), f"{name}__bias": (size,)}


def build_tower(
    config: TransformerConfig, architecture: Architecture, provider: LocalSpecProvider, groups: ProcessGroupCollection
) -> nn.Module:
    """Build the tower."""
    return SquareTower(config, architecture.vision, provider, groups, unused_shapes(architecture.vision))


def tower_entries(architecture: Architecture) -> list[Entry]:
    """The tower's native names to CLIP's and SigLIP's, under `TOWER`."""
    vision, patch_px = architecture.vision, architecture.inputs.patch_px
    entries = [
        flattened("vision.patch_embed.weight", f"{TOWER}embeddings.patch_embedding.weight", (3, patch_px, patch_px)),
        direct("vision.position_table.weight", f"{TOWER}embeddings.position_embedding.weight"),
    ]
    if vision.patch_bias:
        entries.append(direct("vision.patch_embed.bias", f"{TOWER}embeddings.patch_embedding.bias"))
    if vision.class_token:
        entries.append(direct("vision.class_embedding", f"{TOWER}embeddings.class_embedding"))
    for kind in ("weight", "bias") if vision.pre_norm else ():
        entries.append(direct(f"vision.pre_norm.{kind}", f"{TOWER}pre_layrnorm.{kind}"))  # spelt so in CLIP
    for number in range(vision.num_computed_layers):
        entries += _layer_entries(number, vision)
    for key in unused_shapes(vision):
        entries.append(direct(f"vision.unused.{key}", TOWER + key.replace("__", ".")))
    return entries


def _layer_entries(number: int, vision: VisionArchitecture) -> list[Entry]:
    ours, theirs = f"vision.block.layers.{number}.", f"{TOWER}encoder.layers.{number}."
    names = {
        "input_layernorm": "layer_norm1",
        "pre_mlp_layernorm": "layer_norm2",
        "self_attention.linear_proj": "self_attn.out_proj",
        "mlp.linear_fc1": "mlp.fc1",
        "mlp.linear_fc2": "mlp.fc2",
    }
    heads = vision.num_attention_heads
    entries = []
    for kind in ("weight", "bias"):
        query, key, value = (f"{theirs}self_attn.{x}_proj.{kind}" for x in "qkv")
        entries.append(
            split_qkv(
                f"{ours}self_attention.linear_qkv.{kind}", (query, key, value), heads, vision.hidden_size // heads
            )
        )
        entries += [direct(f"{ours}{a}.{kind}", f"{theirs}{b}.{kind}") for a, b in names.items()]
    return entries
