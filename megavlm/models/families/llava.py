"""LLaVA-1.5: CLIP tower (class token dropped), two-layer MLP, and any Llama, Mistral or Qwen decoder.

Source: Liu et al., arXiv 2310.03744; layouts checked against transformers' llava.
"""

from collections.abc import Mapping
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megavlm.config.inputs import InputSpec
from megavlm.errors import use_error
from megavlm.models.activations import ACTIVATIONS
from megavlm.models.architecture import Architecture, VisionArchitecture
from megavlm.models.decoders import decoder_entries, read_decoder
from megavlm.models.family import ModelFamily
from megavlm.models.projector import Connectors, TwoLayerMLP
from megavlm.models.square_tower import SquareTower
from megavlm.models.weight_map import Entry, direct, flattened, split_qkv

# What transformers assumes when a config.json leaves a key out, as those on the hub do.
VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def read_config(config: dict[str, Any]) -> Architecture:
    """Read config.json of a `llava` model."""
    expected: dict[str, Any] = {
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
    }
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise use_error(f"config.json {key}", config[key], str(value), "only LLaVA-1.5's own choice is supported")
    language = read_decoder(config["text_config"], config.get("tie_word_embeddings", False))
    tower = read_tower(config["vision_config"], config.get("vision_feature_layer", -2))
    image_token_id = config.get("image_token_index", config.get("image_token_id", 32000))
    inputs = input_spec(config["vision_config"], image_token_id, language.vocab_size)
    return Architecture("llava", tower, language, inputs)


def read_tower(vision: Mapping[str, Any], feature_layer: Any) -> VisionArchitecture:
    """Read a CLIP `vision_config`.

    Args:
        vision: the config.
        feature_layer: which hidden state is the feature, counted from the end.

    Raises:
        UseError: no CLIP tower, or a feature layer that is none.
    """
    kind = vision.get("model_type", "clip_vision_model")
    if kind != "clip_vision_model":
        raise use_error("vision_config model_type", kind, "clip_vision_model", "use a CLIP tower")
    vision = {**VISION_DEFAULTS, **vision}
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
        class_token=True,
        pre_norm=True,
    )


def input_spec(vision: Mapping[str, Any], image_token_id: int, vocab_size: int) -> InputSpec:
    """Square images of the tower's size, one token a patch."""
    vision = {**VISION_DEFAULTS, **vision}
    return InputSpec(
        image_token_id=image_token_id,
        vocab_size=vocab_size,
        image_kind="square",
        patch_px=vision["patch_size"],
        temporal_patch_size=1,
        merge_size=1,
        image_px=vision["image_size"],
        position_kind="linear",
    )


def unused_shapes(architecture: VisionArchitecture) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors after the feature layer, by their CLIP names with `.` as `__`."""
    size, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    shapes: dict[str, tuple[int, ...]] = {"post_layernorm__weight": (size,), "post_layernorm__bias": (size,)}
    computed = architecture.num_computed_layers
    linears = {"self_attn__q_proj": (size, size), "self_attn__k_proj": (size, size), "self_attn__v_proj": (size, size)}
    linears |= {"self_attn__out_proj": (size, size), "mlp__fc1": (ffn, size), "mlp__fc2": (size, ffn)}
    for number in range(computed, architecture.num_layers):
        layer = f"encoder__layers__{number}__"
        for name, shape in linears.items():
            shapes |= {f"{layer}{name}__weight": shape, f"{layer}{name}__bias": shape[:1]}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{name}__weight": (size,), f"{layer}{name}__bias": (size,)}
    return shapes


def build_tower(
    config: TransformerConfig, architecture: Architecture, provider: LocalSpecProvider, groups: ProcessGroupCollection
) -> nn.Module:
    """Build the CLIP tower."""
    return SquareTower(config, architecture.vision, provider, groups, unused_shapes(architecture.vision))


def build_projector(
    config: TransformerConfig, architecture: Architecture, provider: LocalSpecProvider, groups: ProcessGroupCollection
) -> nn.Module:
    """Linear, GELU, Linear."""
    size = architecture.language.hidden_size
    sizes = (architecture.vision.hidden_size, size, size)
    return Connectors(config, TwoLayerMLP(config, provider, groups, sizes, ACTIVATIONS["gelu"]), [])


TOWER = "vision_tower.vision_model."


def weight_map(architecture: Architecture) -> list[Entry]:
    """Native names to the names of a LLaVA-1.5 checkpoint on the hub."""
    entries = decoder_entries(architecture.language, "language_model.model.", "language_model.lm_head.weight")
    entries += tower_entries(architecture)
    for kind in ("weight", "bias"):
        for ours, theirs in (("linear_fc1", "linear_1"), ("linear_fc2", "linear_2")):
            entries.append(direct(f"projector.main.{ours}.{kind}", f"multi_modal_projector.{theirs}.{kind}"))
    return entries


def tower_entries(architecture: Architecture) -> list[Entry]:
    """The tower's native names to CLIP's, under `TOWER`."""
    vision, patch_px = architecture.vision, architecture.inputs.patch_px
    entries = [
        flattened("vision.patch_embed.weight", f"{TOWER}embeddings.patch_embedding.weight", (3, patch_px, patch_px)),
        direct("vision.class_embedding", f"{TOWER}embeddings.class_embedding"),
        direct("vision.position_table.weight", f"{TOWER}embeddings.position_embedding.weight"),
    ]
    for kind in ("weight", "bias"):
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


def public_name(name: str) -> str:
    """transformers 5 may write `model.vision_tower.encoder...`; the hub's name is `vision_tower.vision_model.`..."""
    name = name.removeprefix("model.")
    if name.startswith("language_model.") and not name.startswith(("language_model.model.", "language_model.lm_head")):
        name = "language_model.model." + name.removeprefix("language_model.")
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    if name.startswith("vision_tower.") and not name.startswith(TOWER):
        return TOWER + name.removeprefix("vision_tower.")
    return name


FAMILY = ModelFamily(
    model_type="llava",
    read_config=read_config,
    build_tower=build_tower,
    build_projector=build_projector,
    weight_map=weight_map,
    public_name=public_name,
)
