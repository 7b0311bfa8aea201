"""What a recipe says of chat templates and of the weight of tokens, and its checks across fields."""

import math
from pathlib import Path

from megavlm.config.schema import DataConfig, TokenWeights
from megavlm.errors import use_error

BUILT_IN_TEMPLATES = ("chatml", "vicuna", "llama2", "llava_plain", "document")


def check_tokens(data: DataConfig) -> None:
    """Check `data.template`, `data.token_weights` and `data.token_weight_schedule`.

    Raises:
        UseError: the first mistake found.
    """
    if data.template and data.template not in BUILT_IN_TEMPLATES:
        if not data.template.endswith(".jinja") or not Path(data.template).is_file():
            raise use_error(
                "data.template",
                f"`{data.template}`",
                f"one of {', '.join(BUILT_IN_TEMPLATES)}, or an existing .jinja file",
                "correct it, or leave it empty for the model's own template",
            )
    _check_weights(data.token_weights, "data.token_weights")
    if not data.token_weight_schedule:
        return
    key = "data.token_weight_schedule"
    if data.token_weights != TokenWeights():
        raise use_error(key, "a schedule and data.token_weights", "one of the two", "remove data.token_weights")
    before = -1.0
    for number, phase in enumerate(data.token_weight_schedule):
        start = phase.from_progress
        if not before < start < 1 or (number == 0 and start != 0):
            raise use_error(
                f"{key}[{number}].from_progress",
                start,
                "0 in the first phase, then ascending shares of the run below 1",
                "correct it",
            )
        before = start
        _check_weights(phase, f"{key}[{number}]")


def _check_weights(weights: TokenWeights, where: str) -> None:
    names = ("special", "instruction", "response", "box", "entity")
    values = {name: vars(weights)[name] for name in names}
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise use_error(f"{where}.{name}", value, "a finite number of at least 0", "correct it")
    if not any(values.values()):
        raise use_error(where, "all 0", "something to learn", f"set {where}.response=1")
