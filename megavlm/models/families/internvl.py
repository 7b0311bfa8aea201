"""InternVL (2.5, 3): InternViT (300M, 6B) with LayerScale on tiles of one size, pixel shuffle, Qwen2, Qwen3 or Llama.

Source: InternVL 1.5 (arXiv 2404.16821), InternVL3 (arXiv 2504.10479); layouts checked against transformers' internvl.
"""

from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megavlm.config.inputs import InputSpec
from megavlm.errors import use_error
from megavlm.models.architecture import Architecture, ConnectorArchitecture, VisionArchitecture
from megavlm.models.decoders import decoder_entries, read_decoder
from megavlm.models.family import ModelFamily
from megavlm.models.projector import Connectors, PixelShuffleMLP
from megavlm.models.square_tower import SquareTower
from megavlm.models.weight_map import Entry, direct, flattened, split_qkv, unsqueezed

# What transformers assumes when a config.json leaves a key out.
VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "attention_bias": False,
    "use_qk_norm": False,
    "intermediate_size": 4096,
    "hidden_act": "gelu",
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "image_size": (448, 448),
    "patch_size": (14, 14),
}
# Keys of vision_config whose other values would need code that is not there.
_ONLY: dict[str, Any] = {
    "use_mask_token": False,
    "use_absolute_position_embeddings": True,
    "use_mean_pooling": True,  # otherwise there is a norm behind the last layer
}
PROJECTOR_NORM_EPSILON = 1e-5
QK_NORM_EPSILON = 1e-6  # whatever layer_norm_eps says
TOWER = "vision_tower."


def read_config(config: dict[str, Any]) -> Architecture:
    """Read config.json of an `internvl` model (the `-hf` directories)."""
    vision = {**VISION_DEFAULTS, **config["vision_config"]}
    expected = {f"vision_config {key}": (vision.get(key, value), value) for key, value in _ONLY.items()}
    for key, value in {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
    }.items():
        expected[key] = (config.get(key, value), value)
    for key, (got, value) in expected.items():
        if got != value:
            raise use_error(f"config.json {key}", got, str(value), "only that is supported")
    text = {"model_type": "qwen2", **config["text_config"]}
    language = read_decoder(text, config.get("tie_word_embeddings", True))
    image_px, patch_px = _side(vision["image_size"], "image_size"), _side(vision["patch_size"], "patch_size")
    merge = round(1 / config.get("downsample_ratio", 0.5))
    side = image_px // patch_px
    if side % merge:
        raise use_error("config.json downsample_ratio", f"1 / {merge}", f"a divisor of {side} patches", "restore it")
    tower = VisionArchitecture(
        num_layers=vision["num_hidden_layers"],
        hidden_size=vision["hidden_size"],
        ffn_hidden_size=vision["intermediate_size"],
        num_attention_heads=vision["num_attention_heads"],
        activation=vision["hidden_act"],
        norm_epsilon=vision["layer_norm_eps"],
        patch_channels=3 * patch_px**2,
        merge_size=1,
        num_positions=side**2,
        class_token=True,
        patch_bias=True,
        layer_scale=True,
        qkv_bias=vision["attention_bias"],
        qk_norm_epsilon=QK_NORM_EPSILON if vision["use_qk_norm"] else None,
        normalization="RMSNorm" if vision["norm_type"] == "rms_norm" else "LayerNorm",
    )
    inputs = InputSpec(
        image_token_id=config.get("image_token_id", 151667),
        vocab_size=language.vocab_size,
        image_kind="tiles",
        patch_px=patch_px,
        temporal_patch_size=1,
        merge_size=merge,
        image_px=image_px,
        position_kind="linear",
        has_borders=True,
    )
    connector = ConnectorArchitecture("pixel_shuffle_mlp", merge_size=merge, norm_epsilon=PROJECTOR_NORM_EPSILON)
    return Architecture("internvl", tower, language, inputs, connector)


def _side(size: int | list[int] | tuple[int, ...], key: str) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise use_error(f"vision_config {key}", size, "as high as wide", "only squares are supported")
    return int(sides.pop())


def build_tower(
    config: TransformerConfig, architecture: Architecture, provider: LocalSpecProvider, groups: ProcessGroupCollection
) -> nn.Module:
    """Build InternViT."""
    return SquareTower(config, architecture.vision, provider, groups, {})


def build_projector(
    config: TransformerConfig, architecture: Architecture, provider: LocalSpecProvider, groups: ProcessGroupCollection
) -> nn.Module:
    """Pixel shuffle, LayerNorm, Linear, GELU, Linear."""
    vision, connector = architecture.vision, architecture.connector
    assert connector is not None
    sizes = (vision.hidden_size, architecture.language.hidden_size)
    side = int(vision.num_positions**0.5)
    main = PixelShuffleMLP(config, provider, groups, sizes, side, connector.merge_size, connector.norm_epsilon)
    return Connectors(config, main, [])


def weight_map(architecture: Architecture) -> list[Entry]:
    """Native names to the names of an InternVL `-hf` checkpoint."""
    vision, patch_px = architecture.vision, architecture.inputs.patch_px
    entries = decoder_entries(architecture.language, "language_model.model.", "language_model.lm_head.weight")
    embeddings = f"{TOWER}embeddings."
    entries += [
        flattened(
            "vision.patch_embed.weight", f"{embeddings}patch_embeddings.projection.weight", (3, patch_px, patch_px)
        ),
        direct("vision.patch_embed.bias", f"{embeddings}patch_embeddings.projection.bias"),
        unsqueezed("vision.class_embedding", f"{embeddings}cls_token", 2),
        unsqueezed("vision.position_table.weight", f"{embeddings}position_embeddings", 1),
    ]
    for number in range(vision.num_layers):
        entries += _layer_entries(number, vision)
    for ours, theirs in (("norm", "layer_norm"), ("linear_fc1", "linear_1"), ("linear_fc2", "linear_2")):
        for kind in ("weight", "bias"):
            entries.append(direct(f"projector.main.mlp.{ours}.{kind}", f"multi_modal_projector.{theirs}.{kind}"))
    return entries


def _layer_entries(number: int, vision: VisionArchitecture) -> list[Entry]:
    ours, theirs = f"vision.block.layers.{number}.", f"{TOWER}encoder.layer.{number}."
    heads, both = vision.num_attention_heads, ("weight", "bias")
    entries = [
        direct(f"{ours}self_attn_bda.scale", f"{theirs}lambda_1"),
        direct(f"{ours}mlp_bda.scale", f"{theirs}lambda_2"),
    ]
    for kind in both if vision.qkv_bias else ("weight",):
        query, key, value = (f"{theirs}attention.{x}_proj.{kind}" for x in "qkv")
        native = f"{ours}self_attention.linear_qkv.{kind}"
        entries.append(split_qkv(native, (query, key, value), heads, vision.hidden_size // heads))
    if vision.qk_norm_epsilon is not None:
        for x in "qk":
            entries.append(direct(f"{ours}self_attention.{x}_layernorm.weight", f"{theirs}attention.{x}_norm.weight"))
    norm_kinds = ("weight",) if vision.normalization == "RMSNorm" else both
    for name, other, kinds in (
        ("input_layernorm", "layernorm_before", norm_kinds),
        ("pre_mlp_layernorm", "layernorm_after", norm_kinds),
        ("self_attention.linear_proj", "attention.projection_layer", both),
        ("mlp.linear_fc1", "mlp.fc1", both),
        ("mlp.linear_fc2", "mlp.fc2", both),
    ):
        entries += [direct(f"{ours}{name}.{kind}", f"{theirs}{other}.{kind}") for kind in kinds]
    return entries


def public_name(name: str) -> str:
    """transformers 5 may write `model.language_model.layers...`; the hub's is `language_model.model.layers...`."""
    name = name.removeprefix("model.")
    if name.startswith("language_model.") and not name.startswith(("language_model.model.", "language_model.lm_head")):
        return "language_model.model." + name.removeprefix("language_model.")
    return "language_model.lm_head.weight" if name == "lm_head.weight" else name


def memory_name(name: str) -> str:
    """The name in transformers 5's memory, `model.language_model.layers...`."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.", 1)


FAMILY = ModelFamily(
    model_type="internvl",
    read_config=read_config,
    build_tower=build_tower,
    build_projector=build_projector,
    weight_map=weight_map,
    public_name=public_name,
    memory_name=memory_name,
)
