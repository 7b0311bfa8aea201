"""Composed models: a CLIP or SigLIP tower, a Llama, Mistral or Qwen decoder, and a connector of choice between them.

`megavlm compose` writes such a directory. With the `mlp` connector it writes a LLaVA directory instead, which other
programs read too; the other connectors have no public model type for every pair of tower and language model.

Shape suffixes: P patches, D tower hidden size, I images, V visual tokens, H language hidden size.
"""

from collections.abc import Mapping
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megavlm.config.inputs import InputSpec
from megavlm.errors import use_error
from megavlm.models.architecture import Architecture, ConnectorArchitecture, LanguageArchitecture
from megavlm.models.clip import build_tower, input_spec, read_tower, tower_entries
from megavlm.models.decoders import decoder_entries, read_decoder
from megavlm.models.families import llava
from megavlm.models.family import ModelFamily
from megavlm.models.projector import Connectors, PixelShuffleMLP
from megavlm.models.resampler import PerceiverResampler, QFormer
from megavlm.models.weight_map import Entry, direct, gated

MODEL_TYPE = "megavlm"
_GATED_LAYERS = "gated_layers."

# What each kind of connector takes beside `type`, with its default; None: follows from the language model.
CONNECTORS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "pixel_shuffle_mlp": {"scale_factor": 2, "layer_norm_eps": 1e-5},
    # Idefics2's
    "perceiver": {
        "num_queries": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 96,
        "rms_norm_eps": 1e-6,
    },
    # Flamingo's: Idefics2's perceiver, and the decoder layers that read it
    "gated_cross_attention": {
        "num_queries": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 96,
        "rms_norm_eps": 1e-6,
        "cross_layer_interval": 4,
    },
    # BLIP-2's
    "qformer": {
        "num_queries": 32,
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "cross_attention_frequency": 2,
        "layer_norm_eps": 1e-12,
    },
}


def read_connector(config: Mapping[str, Any]) -> ConnectorArchitecture:
    """Read `connector_config`.

    Raises:
        UseError: an unknown kind, or a key that the kind does not have.
    """
    kind = config.get("type")
    if kind not in CONNECTORS:
        raise use_error("connector_config type", repr(kind), f"one of {', '.join(CONNECTORS)}", "choose one of these")
    unknown = sorted(set(config) - {"type"} - set(CONNECTORS[kind]))
    if unknown:
        raise use_error(
            f"connector_config of a {kind}",
            ", ".join(unknown),
            f"keys among {', '.join(CONNECTORS[kind]) or 'none'}",
            "remove it",
        )
    values = {**CONNECTORS[kind], **config}
    for key in ("cross_layer_interval", "cross_attention_frequency"):
        if values.get(key, 1) < 1:
            raise use_error(f"connector_config {key}", values[key], "at least 1", "raise it")
    return ConnectorArchitecture(
        kind=kind,
        num_queries=values.get("num_queries", 0),
        depth=values.get("num_hidden_layers", 0),
        hidden_size=values.get("hidden_size", 0),
        ffn_hidden_size=values.get("intermediate_size", 0),
        num_heads=values.get("num_attention_heads", 0),
        num_key_value_heads=values.get("num_key_value_heads", 0),
        head_dim=values.get("head_dim", 0),
        cross_attention_frequency=values.get("cross_layer_interval", values.get("cross_attention_frequency", 1)),
        merge_size=values.get("scale_factor", 1),
        norm_epsilon=values.get("rms_norm_eps", values.get("layer_norm_eps", 1e-6)),
    )


def read_config(config: dict[str, Any]) -> Architecture:
    """Read config.json of a composed model."""
    connector = read_connector(config["connector_config"])
    language = read_decoder(config["text_config"])
    tower = read_tower(config["vision_config"], config.get("vision_feature_layer", -2))
    side = int(tower.num_positions**0.5)
    if side % connector.merge_size:
        raise use_error(
            "connector_config scale_factor",
            connector.merge_size,
            f"a divisor of the tower's {side} patches a side",
            "choose another",
        )
    inputs = input_spec(config["vision_config"], config["image_token_id"], language.vocab_size)
    inputs = InputSpec(**{**vars(inputs), "merge_size": connector.merge_size, "num_queries": connector.num_queries})
    return Architecture(MODEL_TYPE, tower, language, inputs, connector)


def build_projector(
    config: TransformerConfig, architecture: Architecture, provider: LocalSpecProvider, groups: ProcessGroupCollection
) -> nn.Module:
    """The connector of choice."""
    connector, vision, language = architecture.connector, architecture.vision, architecture.language
    assert connector is not None
    if connector.kind == "mlp":
        return llava.build_projector(config, architecture, provider, groups)
    main: MegatronModule
    if connector.kind == "pixel_shuffle_mlp":
        side = int(vision.num_positions**0.5)
        sizes = (vision.hidden_size, language.hidden_size)
        main = PixelShuffleMLP(config, provider, groups, sizes, side, connector.merge_size, connector.norm_epsilon)
    elif connector.kind in ("perceiver", "gated_cross_attention"):
        widths = (vision.hidden_size, language.ffn_hidden_size, language.hidden_size)
        main = PerceiverResampler(config, connector, widths, vision.num_positions)
    else:
        main = QFormer(config, connector, vision.hidden_size, language.hidden_size, vision.num_positions)
    return Connectors(config, main, [])


def connector_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """The connector's parameters by their names: after `projector.main.` here, after `connector.` on disk.

    Those of decoder layers that read images are among them; here they are part of these layers.
    """
    connector, tower, size = architecture.connector, architecture.vision.hidden_size, architecture.language.hidden_size
    assert connector is not None
    if connector.kind == "mlp":
        return _affine("linear_fc1", size, tower) | _affine("linear_fc2", size, size)
    if connector.kind == "pixel_shuffle_mlp":
        merged = tower * connector.merge_size**2
        return (
            _norm("mlp.norm", merged) | _affine("mlp.linear_fc1", size, merged) | _affine("mlp.linear_fc2", size, size)
        )
    if connector.kind == "perceiver":
        return _perceiver_shapes(connector, tower, architecture.language.ffn_hidden_size, size)
    if connector.kind == "gated_cross_attention":
        shapes = _perceiver_shapes(connector, tower, architecture.language.ffn_hidden_size, size)
        return shapes | _gated_layer_shapes(architecture.language, architecture.gate_interval)
    return _qformer_shapes(connector, tower, size)


def _affine(name: str, size_out: int, size_in: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size_out, size_in), f"{name}.bias": (size_out,)}


def _norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _gated(name: str, size_in: int, middle: int, size_out: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.gate.weight": (middle, size_in),
        f"{name}.up.weight": (middle, size_in),
        f"{name}.down.weight": (size_out, middle),
    }


def _perceiver_shapes(
    connector: ConnectorArchitecture, tower: int, middle: int, size: int
) -> dict[str, tuple[int, ...]]:
    wide, narrow = connector.num_heads * connector.head_dim, connector.num_key_value_heads * connector.head_dim
    shapes = _gated("projection", tower, middle, size) | {"latents": (connector.num_queries, size)}
    for number in range(connector.depth):
        layer = f"layers.{number}."
        for norm in ("latents_norm", "context_norm", "mlp_norm"):
            shapes[f"{layer}{norm}.weight"] = (size,)
        shapes |= {f"{layer}query.weight": (wide, size), f"{layer}output.weight": (size, wide)}
        shapes |= {f"{layer}key.weight": (narrow, size), f"{layer}value.weight": (narrow, size)}
        shapes |= _gated(f"{layer}mlp", size, 4 * size, size)
    return shapes | {"norm.weight": (size,)}


def _gated_layer_shapes(language: LanguageArchitecture, interval: int) -> dict[str, tuple[int, ...]]:
    size, width = language.hidden_size, language.num_attention_heads * language.head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(0, language.num_layers, interval):
        layer = f"{_GATED_LAYERS}{number}."
        shapes |= {f"{layer}attention_gate": (1,), f"{layer}mlp_gate": (1,)}
        shapes |= {f"{layer}input_norm.weight": (size,), f"{layer}mlp_norm.weight": (size,)}
        shapes |= {f"{layer}{name}.weight": (width, size) for name in ("query", "key", "value")}
        shapes |= {f"{layer}output.weight": (size, width)} | _gated(f"{layer}mlp", size, language.ffn_hidden_size, size)
    return shapes


def _gated_layer_entries(language: LanguageArchitecture, interval: int) -> list[Entry]:
    entries = []
    for number in range(0, language.num_layers, interval):
        ours, theirs = f"language.decoder.layers.{number}.cross.", f"connector.{_GATED_LAYERS}{number}."
        entries += [
            direct(f"{ours}gates.attention_gate", f"{theirs}attention_gate"),
            direct(f"{ours}gates.mlp_gate", f"{theirs}mlp_gate"),
            direct(f"{ours}input_layernorm.weight", f"{theirs}input_norm.weight"),
            direct(f"{ours}pre_mlp_layernorm.weight", f"{theirs}mlp_norm.weight"),
            *(direct(f"{ours}linear_{name}.weight", f"{theirs}{name}.weight") for name in ("query", "key", "value")),
            direct(f"{ours}linear_proj.weight", f"{theirs}output.weight"),
            gated(f"{ours}mlp.linear_fc1.weight", f"{theirs}mlp.gate.weight", f"{theirs}mlp.up.weight"),
            direct(f"{ours}mlp.linear_fc2.weight", f"{theirs}mlp.down.weight"),
        ]
    return entries


def _qformer_shapes(connector: ConnectorArchitecture, tower: int, size: int) -> dict[str, tuple[int, ...]]:
    width, ffn = connector.hidden_size, connector.ffn_hidden_size
    shapes: dict[str, tuple[int, ...]] = {"queries": (connector.num_queries, width)}
    shapes |= _norm("norm", width) | _affine("projection", size, width)
    for number in range(connector.depth):
        layer = f"layers.{number}."
        attentions = [("attention", width)]
        if number % connector.cross_attention_frequency == 0:
            attentions.append(("cross_attention", tower))
        for name, read in attentions:
            for part, size_in in (("query", width), ("key", read), ("value", read), ("output", width)):
                shapes |= _affine(f"{layer}{name}.{part}", width, size_in)
            shapes |= _norm(f"{layer}{name}.norm", width)
        shapes |= _affine(f"{layer}mlp_fc1", ffn, width) | _affine(f"{layer}mlp_fc2", width, ffn)
        shapes |= _norm(f"{layer}mlp_norm", width)
    return shapes


def weight_map(architecture: Architecture) -> list[Entry]:
    """Native names to those of a composed directory."""
    entries = decoder_entries(architecture.language, "language_model.model.", "language_model.lm_head.weight")
    entries += tower_entries(architecture)
    names = [name for name in connector_shapes(architecture) if not name.startswith(_GATED_LAYERS)]
    entries += [direct(f"projector.main.{name}", f"connector.{name}") for name in names]
    if architecture.gate_interval:
        entries += _gated_layer_entries(architecture.language, architecture.gate_interval)
    return entries


FAMILY = ModelFamily(
    model_type=MODEL_TYPE,
    read_config=read_config,
    build_tower=build_tower,
    build_projector=build_projector,
    weight_map=weight_map,
    public_name=llava.public_name,
    memory_name=llava.memory_name,
)
