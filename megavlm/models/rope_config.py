"""A recipe's rotary frequencies and context length, in the words of a Hugging Face config.json."""

import math
from collections.abc import Mapping
from typing import Any

from megavlm.config.schema import ModelConfig
from megavlm.models.architecture import LanguageArchitecture

_KNOBS = {
    "linear": (),
    "dynamic": (),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow"),
}


def rope_changes(config: Mapping[str, Any], language: LanguageArchitecture, model: ModelConfig) -> dict[str, Any]:
    """Keys of the text part of config.json that a recipe gives other values.

    They are spelled as the config spells them: `rope_parameters` (transformers 5), or `rope_scaling` and `rope_theta`
    (the hub), which older versions of transformers and inference engines read, too.

    Args:
        config: content of config.json.
        language: what it says of the language model.
        model: of the recipe.
    """
    text, knobs = text_part(config), model.rope_scaling
    spelled = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"
    settings = dict(text.get(spelled) or {})
    changes: dict[str, Any] = {}
    if knobs.rope_type:
        stretched = language.rope_scaling
        known = 0 if stretched is None else stretched.original_max_positions
        original = knobs.original_max_position_embeddings or known or language.max_positions
        # what an earlier scaling of another kind has set goes; multimodal sections stay
        kept = {key: value for key, value in settings.items() if key.startswith("mrope") or key == "rope_theta"}
        settings = kept | {"rope_type": knobs.rope_type, "factor": knobs.factor}
        settings |= {name: vars(knobs)[name] for name in _KNOBS[knobs.rope_type]}
        if knobs.rope_type in ("yarn", "llama3"):
            settings["original_max_position_embeddings"] = original
        if knobs.attention_factor:
            settings["attention_factor"] = knobs.attention_factor
        changes[spelled] = settings
        if knobs.rope_type != "dynamic":
            changes["max_position_embeddings"] = math.floor(knobs.factor * original)
    if model.rope_theta:
        if spelled == "rope_parameters":
            changes[spelled] = settings | {"rope_theta": model.rope_theta}
        else:
            changes["rope_theta"] = model.rope_theta
    if model.max_position_embeddings:
        changes["max_position_embeddings"] = model.max_position_embeddings
    return changes


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What of config.json speaks of the language model."""
    part: Mapping[str, Any] = config.get("text_config") or config
    return part


def with_text(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with other values in its text part."""
    text = {**text_part(config), **changes}
    return {**config, "text_config": text} if config.get("text_config") else text
