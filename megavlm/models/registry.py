"""The model families by the `model_type` of their Hugging Face config."""

from megavlm.errors import use_error
from megavlm.models.families import (
    composed,
    internvl,
    llava,
    llava_next,
    llava_onevision,
    qwen2_5_vl,
    qwen3_vl,
    qwen3_vl_moe,
)
from megavlm.models.family import ModelFamily

FAMILIES: dict[str, ModelFamily] = {
    composed.MODEL_TYPE: composed.FAMILY,
    "internvl": internvl.FAMILY,
    "llava": llava.FAMILY,
    llava_next.MODEL_TYPE: llava_next.FAMILY,
    llava_onevision.MODEL_TYPE: llava_onevision.FAMILY,
    "qwen2_5_vl": qwen2_5_vl.FAMILY,
    "qwen3_vl": qwen3_vl.FAMILY,
    qwen3_vl_moe.MODEL_TYPE: qwen3_vl_moe.FAMILY,
}


def family_of(model_type: str) -> ModelFamily:
    """Look a family up.

    Raises:
        UseError: no such family.
    """
    if model_type not in FAMILIES:
        raise use_error("config.json model_type", repr(model_type), f"one of {', '.join(FAMILIES)}", "use such a model")
    return FAMILIES[model_type]
