"""Composed models: any CLIP tower, any Llama/Mistral/Qwen language model, and a connector of choice between them.

`megavlm compose` writes such a directory. With the `mlp` connector it writes a LLaVA directory instead, which other
programs read too; the other connectors have no public model type for every pair of tower and language model.

Shape suffixes: P patches, D tower hidden size, I images, V visual tokens, H language hidden size.
"""

from collections.abc import Mapping
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
from megavlm.models.architecture import Architecture, ConnectorArchitecture
from megavlm.models.decoders import decoder_entries, read_decoder
from megavlm.models.families import llava
from megavlm.models.family import ModelFamily
from megavlm.models.projector import Connectors, TwoLayerMLP
from megavlm.models.resampler import PerceiverResampler, QFormer
from megavlm.models.weight_map import Entry, direct

MODEL_TYPE = "megavlm"

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
    return ConnectorArchitecture(
        kind=kind,
        num_queries=values.get("num_queries", 0),
        depth=values.get("num_hidden_layers", 0),
        hidden_size=values.get("hidden_size", 0),
        ffn_hidden_size=values.get("intermediate_size", 0),
        num_heads=values.get("num_attention_heads", 0),
        num_key_value_heads=values.get("num_key_value_heads", 0),
        head_dim=values.get("head_dim", 0),
        cross_attention_frequency=values.get("cross_attention_frequency", 1),
        merge_size=values.get("scale_factor", 1),
        norm_epsilon=values.get("rms_norm_eps", values.get("layer_norm_eps", 1e-6)),
    )


def read_config(config: dict[str, Any]) -> Architecture:
    """Read config.json of a composed model."""
    connector = read_connector(config["connector_config"])
    language = read_decoder(config["text_config"])
    tower = llava.read_tower(config["vision_config"], config.get("vision_feature_layer", -2))
    side = int(tower.num_positions**0.5)
    if side % connector.merge_size:
        raise use_error(
            "connector_config scale_factor",
            connector.merge_size,
            f"a divisor of the tower's {side} patches a side",
            "choose another",
        )
    inputs = llava.input_spec(config["vision_config"], config["image_token_id"], language.vocab_size)
    inputs = InputSpec(**{**vars(inputs), "merge_size": connector.merge_size, "num_queries": connector.num_queries})
    return Architecture(MODEL_TYPE, tower, language, inputs, connector)


class PixelShuffleMLP(MegatronModule):
    """Neighbouring patches of a square image become one input of a two-layer MLP (InternVL's connector)."""

    def __init__(
        self, config: TransformerConfig, architecture: Architecture, provider: LocalSpecProvider, groups: Any
    ) -> None:
        super().__init__(config=config)
        connector, vision = architecture.connector, architecture.vision
        assert connector is not None
        merge, size = connector.merge_size, architecture.language.hidden_size
        merged = vision.hidden_size * merge**2
        self.num_patches = vision.num_positions
        side = int(self.num_patches**0.5)
        raster = torch.arange(self.num_patches).reshape(side // merge, merge, side // merge, merge)
        # where each patch of merge-block order stands row by row; no part of the state
        self.order = raster.transpose(1, 2).flatten()
        self.mlp = TwoLayerMLP(
            config,
            provider,
            groups,
            (merged, size, size),
            ACTIVATIONS["gelu"],
            merge**2,
            norm_size=merged,
            norm_epsilon=connector.norm_epsilon,
        )

    def forward(self, hidden_PD: torch.Tensor) -> torch.Tensor:
        """[P, D] to [V, H]."""
        blocks = hidden_PD.unflatten(0, (-1, self.num_patches))[:, self.order.to(hidden_PD.device)]
        output: torch.Tensor = self.mlp(blocks.flatten(0, 1))
        return output


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
        main = PixelShuffleMLP(config, architecture, provider, groups)
    elif connector.kind == "perceiver":
        sizes = (vision.hidden_size, language.ffn_hidden_size, language.hidden_size)
        main = PerceiverResampler(config, connector, sizes, vision.num_positions)
    else:
        main = QFormer(config, connector, vision.hidden_size, language.hidden_size, vision.num_positions)
    return Connectors(config, main, [])


def connector_names(architecture: Architecture) -> list[str]:
    """Names of the connector's parameters, after `projector.main.` here and after `connector.` on disk."""
    connector = architecture.connector
    assert connector is not None
    both = ("weight", "bias")
    if connector.kind == "mlp":
        return [f"linear_fc{number}.{kind}" for number in (1, 2) for kind in both]
    if connector.kind == "pixel_shuffle_mlp":
        return [f"mlp.{part}.{kind}" for part in ("norm", "linear_fc1", "linear_fc2") for kind in both]
    layers = [f"layers.{number}." for number in range(connector.depth)]
    if connector.kind == "perceiver":
        parts = "latents_norm context_norm query key value output mlp_norm mlp.gate mlp.up mlp.down".split()
        names = [f"projection.{part}.weight" for part in ("gate", "up", "down")]
        return [*names, "latents", *(f"{layer}{part}.weight" for layer in layers for part in parts), "norm.weight"]
    attention = ("query", "key", "value", "output", "norm")
    names = ["queries", *(f"{part}.{kind}" for part in ("norm", "projection") for kind in both)]
    for number, layer in enumerate(layers):
        parts = [f"attention.{part}" for part in attention]
        if number % connector.cross_attention_frequency == 0:
            parts += [f"cross_attention.{part}" for part in attention]
        parts += ["mlp_fc1", "mlp_fc2", "mlp_norm"]
        names += [f"{layer}{part}.{kind}" for part in parts for kind in both]
    return names


def weight_map(architecture: Architecture) -> list[Entry]:
    """Native names to those of a composed directory."""
    entries = decoder_entries(architecture.language, "language_model.model.", "language_model.lm_head.weight")
    entries += llava.tower_entries(architecture)
    return entries + [direct(f"projector.main.{name}", f"connector.{name}") for name in connector_names(architecture)]


FAMILY = ModelFamily(
    model_type=MODEL_TYPE,
    read_config=read_config,
    build_tower=llava.build_tower,
    build_projector=build_projector,
    weight_map=weight_map,
    public_name=llava.public_name,
)
