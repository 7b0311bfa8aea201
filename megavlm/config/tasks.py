"""Tasks that weigh differently in the loss, and losses of boxes and masks: what a recipe says, and its checks."""

import math

from megavlm.config.schema import Recipe
from megavlm.config.stage_knobs import SftConfig
from megavlm.errors import use_error

# Knobs that only some ways of weighting read.
_READ_BY = {
    "task_weights": ("fixed",),
    "task_weight_lr": ("uncertainty", "gradnorm"),
    "task_weight_alpha": ("gradnorm",),
    "task_weight_temperature": ("loss_ratio",),
    "task_weight_momentum": ("loss_ratio",),
}
BIN_FORMAT = "bin_tokens_1000"
NUM_COORDINATE_BINS = 1000
BOX_MARKERS = ("<|box_start|>", "<|box_end|>", "<|object_ref_start|>", "<|object_ref_end|>")
"""What stands around coordinates and names in that notation, beside the coordinates."""
GRID_FORMAT = "grid_tokens_32"
GRID_SIDE = 32
"""Cells of the grid along each side of an image, as Kosmos-2 has them."""
GRID_MARKERS = ("<object>", "</object>", "<phrase>", "</phrase>")
"""What stands around cells and names in that notation."""


def coordinate_token(number: int) -> str:
    """The token of a coordinate of `number` / (NUM_COORDINATE_BINS - 1) of an image's side."""
    return f"<|{number}|>"


SEGMENT_TOKEN = "<seg>"
"""What stands for a mask in an answer; LISA's [SEG]."""


def cell_token(number: int) -> str:
    """The token of a cell of the grid, counted row by row from 0 to GRID_SIDE ** 2 - 1."""
    return f"<patch_index_{number:04}>"


def task_names(recipe: Recipe) -> tuple[str, ...]:
    """The tasks whose losses are told apart; none where they are not weighted."""
    if recipe.sft.task_weighting == "none":
        return ()
    data = recipe.data
    return tuple(task.name for task in data.mixture_tasks) or tuple(source.name for source in data.mixture)


def check_tasks(recipe: Recipe) -> None:
    """Check `sft.task_*` against each other and against the mixture.

    Raises:
        UseError: the first mistake found.
    """
    knobs, default = recipe.sft, SftConfig()
    for name, ways in _READ_BY.items():
        if knobs.task_weighting not in ways and vars(knobs)[name] != vars(default)[name]:
            raise use_error(
                f"sft.{name}",
                f"a value with sft.task_weighting={knobs.task_weighting}",
                f"sft.task_weighting={' or '.join(ways)}",
                f"remove it, or set sft.task_weighting={ways[0]}",
            )
    if knobs.task_weighting == "none":
        return
    names = task_names(recipe)
    if len(names) < 2:
        raise use_error(
            "sft.task_weighting",
            f"{knobs.task_weighting} with {'one task' if names else 'no data.mixture'}",
            "a data.mixture, whose sources (or data.mixture_tasks) are the tasks",
            "name the rows of each task as a source of data.mixture, or set sft.task_weighting=none",
        )
    seen: set[str] = set()
    for number, entry in enumerate(knobs.task_weights):
        where = f"sft.task_weights[{number}]"
        if entry.name not in names:
            kind = "data.mixture_tasks" if recipe.data.mixture_tasks else "data.mixture"
            raise use_error(
                f"{where}.name", f"`{entry.name}`", f"a task of {kind}: {', '.join(names)}", "correct the name"
            )
        if entry.name in seen:
            raise use_error(f"{where}.name", f"`{entry.name}` again", "each task once", "remove one of the two")
        if not (math.isfinite(entry.weight) and entry.weight >= 0):
            raise use_error(f"{where}.weight", entry.weight, "a finite number of at least 0", "correct it")
        seen.add(entry.name)
    if seen == set(names) and not any(entry.weight for entry in knobs.task_weights):
        raise use_error("sft.task_weights", "all 0", "a task that is learned", "raise one of them")


def check_boxes(recipe: Recipe) -> None:
    """Check `sft.box_*` against the notation of boxes.

    Raises:
        UseError: the first mistake found.
    """
    knobs, default, box_format = recipe.sft, SftConfig(), recipe.data.box_format
    weights = ("box_l1_weight", "box_giou_weight")
    if not knobs.box_loss_coeff:
        for name in weights:
            if vars(knobs)[name] != vars(default)[name]:
                raise use_error(
                    f"sft.{name}", "a value without sft.box_loss_coeff", "sft.box_loss_coeff above 0", "set it, e.g. 1"
                )
        return
    if box_format != BIN_FORMAT:
        what = (
            "where a token is a cell of a grid" if box_format == GRID_FORMAT else "where a coordinate is several tokens"
        )
        found = f"data.box_format={box_format}, {what}" if box_format else "no box_format"
        raise use_error(
            "sft.box_loss_coeff",
            f"{knobs.box_loss_coeff} with {found}",
            f"data.box_format={BIN_FORMAT}, where a coordinate is one token",
            f"set data.box_format={BIN_FORMAT}, and model.hf_dir to what `megavlm add-tokens --coordinates` writes",
        )
    if knobs.task_weighting == "gradnorm":
        raise use_error(
            "sft.box_loss_coeff",
            f"{knobs.box_loss_coeff} with sft.task_weighting=gradnorm",
            "one of the two: the loss of a box has no weight of a task, but its gradient arrives with those that have",
            "set sft.task_weighting=loss_ratio or uncertainty, or sft.box_loss_coeff=0",
        )
    if not any(vars(knobs)[name] for name in weights):
        raise use_error("sft.box_l1_weight", "0, as box_giou_weight", "one of them above 0", "set it, e.g. 5")


def check_masks(recipe: Recipe) -> None:
    """Check `sft.mask_*` against each other and against weights of tasks.

    Raises:
        UseError: the first mistake found.
    """
    knobs, default = recipe.sft, SftConfig()
    weights = ("mask_bce_weight", "mask_dice_weight")
    if not knobs.mask_loss_coeff:
        for name in (*weights, "mask_head_dim"):
            if vars(knobs)[name] != vars(default)[name]:
                raise use_error(
                    f"sft.{name}",
                    "a value without sft.mask_loss_coeff",
                    "sft.mask_loss_coeff above 0",
                    "set it, e.g. 1",
                )
        return
    if knobs.task_weighting == "gradnorm":
        raise use_error(
            "sft.mask_loss_coeff",
            f"{knobs.mask_loss_coeff} with sft.task_weighting=gradnorm",
            "one of the two: the loss of a mask has no weight of a task, but its gradient arrives with those that have",
            "set sft.task_weighting=loss_ratio or uncertainty, or sft.mask_loss_coeff=0",
        )
    if not any(vars(knobs)[name] for name in weights):
        raise use_error("sft.mask_bce_weight", "0, as mask_dice_weight", "one of them above 0", "set it, e.g. 2")
