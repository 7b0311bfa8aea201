"""What the models' code does that an `Architecture` does not say, by family: which tensors there are beside the usual.

A family that is added to `models/registry.py` gets its line here; a test compares the counts with the real modules.
"""

from dataclasses import dataclass

from megavlm.errors import use_error
from megavlm.models.architecture import Architecture


@dataclass(frozen=True)
class TowerTraits:
    """A vision tower's own ways.

    Attributes:
        rotary: rotary positions, in every layer.
        interpolated: positions are sampled from a table by four corners; otherwise the table is added as it is.
        merger_norm: the connectors begin with a norm.
    """

    rotary: bool
    interpolated: bool
    merger_norm: bool


TOWERS: dict[str, TowerTraits] = {
    "qwen3_vl": TowerTraits(
        rotary=True,
        interpolated=True,
        merger_norm=True,
    ),
    "qwen2_5_vl": TowerTraits(
        rotary=True,
        interpolated=False,
        merger_norm=True,
    ),
    "internvl": TowerTraits(rotary=False, interpolated=False, merger_norm=True),
    "llava": TowerTraits(
        rotary=False,
        interpolated=False,
        merger_norm=False,
    ),
}
TOWERS["qwen3_vl_moe"] = TOWERS["qwen3_vl"]
# CLIP's and SigLIP's, whatever connects them
TOWERS |= dict.fromkeys(("llava_next", "llava_onevision", "megavlm"), TOWERS["llava"])


def tower_traits(architecture: Architecture) -> TowerTraits:
    """Traits of a model's tower.

    Raises:
        UseError: the planner does not know the family.
    """
    if architecture.family not in TOWERS:
        raise use_error("model.hf_dir", architecture.family, f"a family of {', '.join(TOWERS)}", "plan one of these")
    return TOWERS[architecture.family]
