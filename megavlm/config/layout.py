"""Which decoder layers sit on which pipeline stage: Megatron's layout notation, or an even split.

Stages are numbered as Megatron orders them: stage = virtual_stage * pipeline_size + pipeline_rank, so that layers
run through the stages in order.
"""

import re

from megavlm.config.schema import ParallelConfig
from megavlm.errors import UseError, use_error

_KEY = "parallel.pipeline_model_parallel_layout"
_GROUP = re.compile(r"\(([^()]*)\)\*(\d+)")
_SINGLE = re.compile(r"([EtL|])\*(\d+)")
# A typing mistake such as `t*99999999` must not eat the memory of a login node.
_MAX_SYMBOLS = 100_000


def parse_pipeline_layout(text: str, num_layers: int | None, num_stages: int) -> tuple[int, ...]:
    """Count the decoder layers per stage in Megatron's layout notation.

    `|` separates stages, `E` is the embedding (and the vision encoder with it), `t` a decoder layer, `L` the loss
    (the output layer); `t*3` and `(tt|)*2` repeat, and commas mean nothing. `Et*3|(tt|)*2,tL` is four stages of 3,
    2, 2 and 1 layers.

    Args:
        text: the layout.
        num_layers: decoder layers of the model; None when it is not known yet.
        num_stages: pipeline size times virtual pipeline size.

    Returns:
        Decoder layers per stage, in stage order.

    Raises:
        UseError: the notation is wrong, or it does not fit the model or the pipeline.
    """
    stages = _expand(text).split("|")
    if len(stages) != num_stages:
        raise _layout_error(
            text,
            f"{len(stages)} stages",
            f"{num_stages} (pipeline_model_parallel_size x virtual_pipeline_model_parallel_size)",
            "change the number of `|`, or the pipeline sizes",
        )
    _check_ends(text, stages)
    counts = tuple(stage.count("t") for stage in stages)
    if num_layers is not None and sum(counts) != num_layers:
        raise _layout_error(
            text,
            f"{sum(counts)} decoder layers {counts}",
            f"the model's {num_layers}",
            "change the number of `t`",
        )
    return counts


def language_pipeline_size(parallel: ParallelConfig) -> int:
    """Pipeline ranks that hold the language model: all, but with `stage` those that the encoder has."""
    vision = parallel.vision_pipeline_model_parallel_size if parallel.vision_placement == "stage" else 0
    return parallel.pipeline_model_parallel_size - vision


def split_evenly(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage, the larger parts first."""
    small, num_larger = divmod(num_layers, num_stages)
    return tuple(small + (stage < num_larger) for stage in range(num_stages))


def layers_per_stage(parallel: ParallelConfig, num_layers: int) -> tuple[int, ...]:
    """Return the decoder layers of each stage, in stage order: the layout's, or an even split where there is none.

    Raises:
        UseError: the layout is wrong, or there is none and the layers do not divide by the stages.
    """
    num_stages = language_pipeline_size(parallel) * parallel.virtual_pipeline_model_parallel_size
    if parallel.pipeline_model_parallel_layout:
        return parse_pipeline_layout(parallel.pipeline_model_parallel_layout, num_layers, num_stages)
    if num_layers % num_stages != 0:
        raise use_error(
            "parallel.pipeline_model_parallel_size",
            f"{num_stages} stages (pipeline x virtual pipeline) for {num_layers} decoder layers",
            f"a number of stages that divides {num_layers}",
            f"use one of {divisors(num_layers)}, or name the layers of each stage in {_KEY}, "
            f"e.g. {_uneven_example(num_layers, num_stages)}",
        )
    return (num_layers // num_stages,) * num_stages


def divisors(number: int, limit: int = 64) -> str:
    """List the divisors of a number up to `limit`, for a message that says what would do."""
    return ", ".join(str(n) for n in range(1, min(number, limit) + 1) if number % n == 0)


def _expand(text: str) -> str:
    """Write out the repetitions: `E(tt|)*2L` becomes `Ett|tt|L`."""
    expanded = text.replace(",", "")
    # Groups first, then single symbols, as Megatron does: `(t*2|)*2` is `t*2|t*2|`.
    for pattern in (_GROUP, _SINGLE):
        size = sum(len(match[1]) * int(match[2]) for match in pattern.finditer(expanded))
        if size > _MAX_SYMBOLS:
            raise _layout_error(text, f"{size} symbols", f"at most {_MAX_SYMBOLS}", "check the numbers after `*`")
        if any(int(match[2]) == 0 for match in pattern.finditer(expanded)):
            raise _layout_error(text, "a repetition `*0`", "at least `*1`", "remove what is not wanted")
        expanded = pattern.sub(lambda match: match[1] * int(match[2]), expanded)
    if "m" in expanded:
        raise _layout_error(text, "`m` (multi-token prediction)", "E, t, L and |", "remove `m`: no model here has it")
    wrong = sorted(set(expanded) - set("EtL|"))
    if wrong:
        raise _layout_error(
            text,
            f"{' '.join(repr(symbol) for symbol in wrong)} in it",
            "E, t, L, |, `t*3` and `(tt|)*2`",
            "write e.g. Et|tt|tL (groups do not nest)",
        )
    return expanded


def _check_ends(text: str, stages: list[str]) -> None:
    """Embedding first, loss last, each once, and no stage without anything."""
    whole = "".join(stages)
    if whole.count("E") != 1 or not stages[0].startswith("E"):
        raise _layout_error(text, f"{whole.count('E')} `E`", "one, at the very start", "start with E, e.g. Et|tL")
    if whole.count("L") != 1 or not stages[-1].endswith("L"):
        raise _layout_error(text, f"{whole.count('L')} `L`", "one, at the very end", "end with L, e.g. Et|tL")
    for number, stage in enumerate(stages):
        if not stage:
            raise _layout_error(
                text, f"nothing in stage {number} (from 0)", "E, t or L in every stage", "remove a `|`, or give it a t"
            )


def _layout_error(text: str, got: str, expected: str, fix: str) -> UseError:
    return use_error(f"{_KEY} `{text}`", got, expected, fix)


def _uneven_example(num_layers: int, num_stages: int) -> str:
    """Return a layout that fits, the first stages (the encoder is there) having the fewer layers."""
    small, num_bigger = divmod(num_layers, num_stages)
    counts = [small + (stage >= num_stages - num_bigger) for stage in range(num_stages)]
    # A middle stage may not be empty: with more stages than layers there is no such layout.
    if num_layers < max(num_stages - 2, 1):
        return f"a layout with at most {num_layers + 2} stages"
    if small == 0:
        counts = [0] + [1] * (num_stages - 2) + [num_layers - num_stages + 2]
    return "E" + "|".join("t" * count for count in counts) + "L"
