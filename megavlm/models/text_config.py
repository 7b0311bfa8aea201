"""The text part of a Hugging Face config: what Llama- and Qwen-like decoders have in common."""

import math
from collections.abc import Mapping
from typing import Any

from megavlm.errors import use_error
from megavlm.models.architecture import LanguageArchitecture, RopeScaling


def rope_settings(text: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE keys, in the hub's spelling (`rope_theta`, `rope_scaling`) or that of transformers 5 (`rope_parameters`).

    Raises:
        UseError: a kind of RoPE scaling that is not supported.
    """
    found = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    if "rope_theta" not in found and "rope_theta" in text:
        found["rope_theta"] = text["rope_theta"]
    kind = found.get("rope_type", found.get("type", "default"))
    # Qwen2-VL's checkpoints on the hub call plain multimodal RoPE `mrope`
    # dynamic scaling begins behind max_position_embeddings, where no row gets to
    if kind not in ("default", "mrope", "linear", "llama3", "yarn", "dynamic"):
        raise use_error(
            "text_config rope_type",
            kind,
            "default, linear, llama3, yarn or dynamic",
            "no other RoPE scaling is supported",
        )
    return found


def rope_scaling(settings: Mapping[str, Any], max_positions: int) -> RopeScaling | None:
    """The scaling that `rope_settings` of a model for so many positions speak of; None: plain RoPE."""
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "linear":
        return RopeScaling("linear", float(settings["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(settings["factor"]),
            float(settings["low_freq_factor"]),
            float(settings["high_freq_factor"]),
            int(settings["original_max_position_embeddings"]),
        )
    if kind == "yarn":
        original = int(settings.get("original_max_position_embeddings") or max_positions)
        factor = float(settings.get("factor") or max_positions / original)
        attention_factor = settings.get("attention_factor")
        if attention_factor is None:
            over, under = (settings.get(name) for name in ("mscale", "mscale_all_dim"))
            ratio = _concentration(factor, over) / _concentration(factor, under) if over and under else None
            attention_factor = _concentration(factor) if ratio is None else ratio
        return RopeScaling(
            "yarn",
            factor,
            float(settings.get("beta_slow") or 1),
            float(settings.get("beta_fast") or 32),
            original,
            float(attention_factor),
            bool(settings.get("truncate", True)),
        )
    return None


def _concentration(factor: float, weight: float = 1.0) -> float:
    """Of yarn: the square root of 1/t, arXiv 2309.00071, section 3.4."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def read_language(
    text: Mapping[str, Any], tied: bool, defaults: Mapping[str, Any], **traits: Any
) -> LanguageArchitecture:
    """Read a decoder.

    Args:
        text: `text_config`.
        tied: whether embedding and output layer share their weights.
        defaults: values of keys that a config may leave out, `rope_theta` and `head_dim` (None: hidden size / heads)
            among them.
        **traits: further fields of `LanguageArchitecture`: what the config does not say.
    """
    text = {**defaults, **text}
    heads = text["num_attention_heads"]
    settings = rope_settings(text)
    return LanguageArchitecture(
        num_layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        ffn_hidden_size=text["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        norm_epsilon=text["rms_norm_eps"],
        vocab_size=text["vocab_size"],
        max_positions=text["max_position_embeddings"],
        rotary_base=settings["rope_theta"],
        tied_embeddings=tied,
        rope_scaling=rope_scaling(settings, text["max_position_embeddings"]),
        **traits,
    )
