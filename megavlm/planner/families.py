"""What the models' code does that an `Architecture` does not say, by family: which tensors there are beside the usual.

A family that is added to `models/registry.py` gets its line here; a test compares the counts with the real modules.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from megavlm.errors import use_error
from megavlm.models.architecture import Architecture

Place = Literal["qkv", "proj", "fc1", "fc2"]
"""Of a linear in its attention or MLP."""
Linears = Mapping[Place, tuple[str, ...]]

_QWEN3: Linears = MappingProxyType(
    {"qkv": ("attn.qkv",), "proj": ("attn.proj",), "fc1": ("mlp.linear_fc1",), "fc2": ("mlp.linear_fc2",)}
)
_QWEN2_5: Linears = MappingProxyType(
    dict(_QWEN3) | {"fc1": ("mlp.gate_proj", "mlp.up_proj"), "fc2": ("mlp.down_proj",)}
)
_CLIP: Linears = MappingProxyType(
    {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "proj": ("self_attn.out_proj",),
        "fc1": ("mlp.fc1",),
        "fc2": ("mlp.fc2",),
    }
)
_INTERN: Linears = MappingProxyType(
    {
        "qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "proj": ("attention.projection_layer",),
        "fc1": ("mlp.fc1",),
        "fc2": ("mlp.fc2",),
    }
)


@dataclass(frozen=True)
class TowerTraits:
    """A vision tower's own ways.

    Attributes:
        rotary: rotary positions, in every layer.
        interpolated: positions are sampled from a table by four corners; otherwise the table is added as it is.
        merger_norm: the connectors begin with a norm.
        linears: ends of the Hugging Face names of what a layer's linears are made of.
        connector: the same of a connector's two.
    """

    rotary: bool
    interpolated: bool
    merger_norm: bool
    linears: Linears
    connector: tuple[str, str]


TOWERS: dict[str, TowerTraits] = {
    "qwen3_vl": TowerTraits(
        rotary=True,
        interpolated=True,
        merger_norm=True,
        linears=_QWEN3,
        connector=("linear_fc1", "linear_fc2"),
    ),
    "qwen2_5_vl": TowerTraits(
        rotary=True,
        interpolated=False,
        merger_norm=True,
        linears=_QWEN2_5,
        connector=("mlp.0", "mlp.2"),
    ),
    "internvl": TowerTraits(
        rotary=False,
        interpolated=False,
        merger_norm=True,
        linears=_INTERN,
        connector=("linear_1", "linear_2"),
    ),
    "llava": TowerTraits(
        rotary=False,
        interpolated=False,
        merger_norm=False,
        linears=_CLIP,
        connector=("linear_1", "linear_2"),
    ),
}
TOWERS["qwen3_vl_moe"] = TOWERS["qwen3_vl"]
# CLIP's and SigLIP's, whatever connects them
TOWERS |= dict.fromkeys(("llava_next", "llava_onevision"), TOWERS["llava"])
TOWERS["megavlm"] = replace(TOWERS["llava"], connector=("linear_fc1", "linear_fc2"))


def tower_traits(architecture: Architecture) -> TowerTraits:
    """Traits of a model's tower.

    Raises:
        UseError: the planner does not know the family.
    """
    if architecture.family not in TOWERS:
        raise use_error("model.hf_dir", architecture.family, f"a family of {', '.join(TOWERS)}", "plan one of these")
    return TOWERS[architecture.family]
