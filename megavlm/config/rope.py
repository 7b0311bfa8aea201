"""The section `model.rope_scaling`: another context length, or other rotary frequencies, than the model came with."""

import math
from dataclasses import dataclass
from typing import Literal

from megavlm.errors import use_error


@dataclass(frozen=True)
class RopeScalingConfig:
    """How rotary frequencies are stretched; keys are those of transformers' `rope_scaling`."""

    rope_type: Literal["", "linear", "llama3", "yarn", "dynamic"] = ""
    """Empty: as the model's config says. `yarn` (arXiv 2309.00071), `linear` (arXiv 2306.15595), `llama3` (Llama 3.1).
    `dynamic` stretches behind max_position_embeddings only, by the longest row of a batch: that is for inference, and
    training, which never gets there, is the same without it."""
    factor: float = 1.0
    """The new context is original_max_position_embeddings x this (with `dynamic` it stays)."""
    original_max_position_embeddings: int = 0
    """Context of pretraining in tokens; 0: the model's."""
    attention_factor: float = 0.0
    """Of yarn: cosines and sines are multiplied by this; 0: 1 + ln(factor) / 10."""
    beta_fast: float = 32.0
    """Of yarn: frequencies that turn more often than this within the original context stay as they are."""
    beta_slow: float = 1.0
    """Of yarn: those that turn less often are divided by the factor."""
    low_freq_factor: float = 1.0
    """Of llama3: turns below which a frequency is divided by the factor."""
    high_freq_factor: float = 4.0
    """Of llama3: turns above which it stays as it is."""


_OF_KIND: dict[str, tuple[str, ...]] = {
    "attention_factor": ("yarn",),
    "beta_fast": ("yarn",),
    "beta_slow": ("yarn",),
    "low_freq_factor": ("llama3",),
    "high_freq_factor": ("llama3",),
    "original_max_position_embeddings": ("linear", "llama3", "yarn"),
    "factor": ("linear", "llama3", "yarn", "dynamic"),
}


def check_rope(knobs: RopeScalingConfig) -> None:
    """Check the section.

    Raises:
        UseError: a number is out of bounds, or a knob is set that its kind does not read.
    """
    where, plain = "model.rope_scaling", RopeScalingConfig()
    for name, kinds in _OF_KIND.items():
        value = vars(knobs)[name]
        if not math.isfinite(value) or value < 0:
            raise use_error(f"{where}.{name}", value, "a finite number of at least 0", f"remove {name}")
        if value != vars(plain)[name] and knobs.rope_type not in kinds:
            raise use_error(
                f"{where}.{name}",
                f"{value} with rope_type `{knobs.rope_type}`",
                f"rope_type {' or '.join(kinds)}",
                f"set {where}.rope_type={kinds[-1]}, or remove {name}",
            )
    if knobs.rope_type and knobs.factor <= 1:
        raise use_error(f"{where}.factor", knobs.factor, "more than 1", f"e.g. {where}.factor=4")
    for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
        if not 0 < vars(knobs)[low] < vars(knobs)[high]:
            raise use_error(
                f"{where}.{low}", vars(knobs)[low], f"above 0 and below {high} {vars(knobs)[high]}", "correct one"
            )
