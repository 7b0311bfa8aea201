"""LLaVA-NeXT (1.6): LLaVA-1.5's parts on an image and on its tiles, joined line by line.

Source: https://llava-vl.github.io/blog/2024-01-30-llava-next; layouts checked against transformers' llava_next.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megavlm.errors import use_error
from megavlm.models.activations import ACTIVATIONS
from megavlm.models.anyres import AnyresConnector
from megavlm.models.architecture import Architecture
from megavlm.models.clip import build_tower
from megavlm.models.families import llava
from megavlm.models.family import ModelFamily
from megavlm.models.projector import TwoLayerMLP
from megavlm.models.weight_map import Entry, direct

MODEL_TYPE = "llava_next"

# What transformers assumes when a config.json leaves the key out.
_SIZES = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def read_config(config: dict[str, Any]) -> Architecture:
    """Read config.json of a `llava_next` model."""
    plain = llava.read_config(config)
    sizes = config.get("image_grid_pinpoints") or _SIZES
    return with_tiles(plain, MODEL_TYPE, sizes)


def with_tiles(plain: Architecture, model_type: str, sizes: Sequence[Sequence[int]], **traits: Any) -> Architecture:
    """A model on images of one size, made one on tiles.

    Args:
        plain: what reads one image.
        model_type: of the family.
        sizes: (height, width) in pixels of images that tiles make up.
        **traits: further fields of its `InputSpec`.

    Raises:
        UseError: sizes that tiles do not make up.
    """
    tile_px = plain.inputs.image_px
    tile_sizes = tuple((int(height), int(width)) for height, width in sizes)
    for size in tile_sizes:
        if min(size) < tile_px or any(length % tile_px for length in size):
            raise use_error(
                "config.json image_grid_pinpoints",
                list(size),
                f"multiples of the tower's image_size {tile_px}",
                "restore the file",
            )
    inputs = dataclasses.replace(plain.inputs, image_kind="anyres", tile_sizes=tile_sizes, **traits)
    return dataclasses.replace(plain, family=model_type, inputs=inputs)


def build_projector(
    config: TransformerConfig, architecture: Architecture, provider: LocalSpecProvider, groups: ProcessGroupCollection
) -> nn.Module:
    """Linear, GELU, Linear, and the token that ends a line."""
    size = architecture.language.hidden_size
    sizes = (architecture.vision.hidden_size, size, size)
    main = TwoLayerMLP(config, provider, groups, sizes, ACTIVATIONS["gelu"])
    return AnyresConnector(config, architecture.inputs, main, size)


def weight_map(architecture: Architecture) -> list[Entry]:
    """Native names to the names of a checkpoint on the hub: LLaVA-1.5's, and one more."""
    return [*llava.weight_map(architecture), direct("projector.newline", "image_newline")]


FAMILY = ModelFamily(
    model_type=MODEL_TYPE,
    read_config=read_config,
    build_tower=build_tower,
    build_projector=build_projector,
    weight_map=weight_map,
    public_name=llava.public_name,
    memory_name=llava.memory_name,
)
