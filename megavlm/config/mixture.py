"""Checks of what training rows are drawn from: `data.mixture` and `data.curriculum`."""

import math

from megavlm.config.schema import DataConfig, Recipe
from megavlm.errors import use_error


def phase_starts(data: DataConfig, train_iters: int) -> tuple[int, ...]:
    """The first step, from 0, of every phase of the curriculum."""
    # A fraction like 0.3 is a little less than what was typed: 0.3 * 10 is to be step 3 all the same.
    return tuple(
        phase.start_iters or math.floor(phase.start_fraction * train_iters + 1e-9) for phase in data.curriculum
    )


def check_mixture(recipe: Recipe) -> None:
    """Check sources, tasks and phases.

    Raises:
        UseError: the first mistake found, by key.
    """
    data = recipe.data
    if bool(data.train) == bool(data.mixture):
        both = bool(data.train)
        raise use_error(
            "data.train",
            "data.mixture too" if both else "nothing",
            "one of the two" if both else "one file of training rows or more",
            "name the files of data.train as a source of data.mixture" if both else "set data.train=rows.jsonl",
        )
    if data.mixture:
        _check_sources(data)
        _check_tasks(data)
    else:
        _check_unused(data)
    _check_end(recipe)
    _check_curriculum(recipe)


def _check_unused(data: DataConfig) -> None:
    for key, is_set in (
        ("mixture_temperature", data.mixture_temperature > 0),
        ("mixture_tasks", bool(data.mixture_tasks)),
        ("mixture_stop", data.mixture_stop != "never"),
    ):
        if is_set:
            raise use_error(f"data.{key}", "a value without data.mixture", "data.mixture", f"remove data.{key}")


def _check_sources(data: DataConfig) -> None:
    names = [source.name for source in data.mixture]
    for number, source in enumerate(data.mixture):
        where = f"data.mixture[{number}]"
        if not source.name:
            raise use_error(f"{where}.name", "nothing", "a name", "name the source")
        if names.index(source.name) != number:
            raise use_error(f"{where}.name", f"`{source.name}` again", "a name of its own", "rename one of the two")
        if not source.paths:
            raise use_error(f"{where}.paths", "nothing", "one file of training rows or more", "name its files")
        for key in ("weight", "epochs"):
            _check_number(f"{where}.{key}", vars(source)[key])
    by_epochs = [source.epochs > 0 for source in data.mixture]
    if any(by_epochs):
        number = by_epochs.index(False) if False in by_epochs else -1
        if number >= 0:
            raise use_error(f"data.mixture[{number}].epochs", 0, "epochs for every source or for none", "set it")
        if data.mixture_temperature or data.mixture_tasks or any(source.weight != 1 for source in data.mixture):
            raise use_error(
                "data.mixture",
                "epochs with weights, mixture_temperature or mixture_tasks",
                "epochs alone: they are the shares",
                "remove one or the other",
            )
    elif not any(source.weight > 0 for source in data.mixture):
        raise use_error("data.mixture", "no weight above 0", "a source with a weight", "set a weight")


def _check_tasks(data: DataConfig) -> None:
    names = [task.name for task in data.mixture_tasks]
    for number, task in enumerate(data.mixture_tasks):
        where = f"data.mixture_tasks[{number}]"
        _check_number(f"{where}.weight", task.weight)
        if not task.name or names.index(task.name) != number:
            raise use_error(f"{where}.name", f"`{task.name}`", "a name of its own", "rename it")
        if not task.weight:
            raise use_error(f"{where}.weight", 0, "more than 0", "remove the task, and set its sources' weights to 0")
    for number, source in enumerate(data.mixture):
        if source.task not in (names or [""]):
            raise use_error(
                f"data.mixture[{number}].task",
                f"`{source.task}`",
                f"one of {', '.join(names)}" if names else "nothing without data.mixture_tasks",
                "add it to data.mixture_tasks",
            )


def _check_end(recipe: Recipe) -> None:
    data, train = recipe.data, recipe.train
    if not data.mixture:
        return
    ends = data.mixture_stop != "never"
    by_epochs = any(source.epochs > 0 for source in data.mixture)
    if ends and by_epochs:
        raise use_error(
            "data.mixture_stop", f"{data.mixture_stop} with epochs", "never: epochs say when it ends", "remove it"
        )
    if ends and train.train_iters:
        raise use_error(
            "data.mixture_stop",
            f"{data.mixture_stop} with train.train_iters",
            "train.num_train_epochs, whose length it says",
            "set train.train_iters=0 and train.num_train_epochs=1, or data.mixture_stop=never",
        )
    if train.num_train_epochs and not ends and not by_epochs:
        raise use_error(
            "train.num_train_epochs",
            f"{train.num_train_epochs} with a data.mixture that never ends",
            "train.train_iters, data.mixture_stop, or epochs of the sources",
            "set data.mixture_stop=all_exhausted or train.train_iters",
        )


def _check_curriculum(recipe: Recipe) -> None:
    data, train_iters = recipe.data, recipe.train.train_iters
    if not data.curriculum:
        return
    if not train_iters:
        raise use_error(
            "data.curriculum", "a run without train.train_iters", "a number of steps", "set train.train_iters"
        )
    for number, phase in enumerate(data.curriculum):
        where = f"data.curriculum[{number}]"
        for key in ("start_iters", "start_fraction", "max_length"):
            _check_number(f"{where}.{key}", vars(phase)[key])
        if phase.start_fraction >= 1 or (phase.start_fraction and phase.start_iters):
            raise use_error(
                f"{where}.start_fraction",
                f"{phase.start_fraction} and start_iters {phase.start_iters}",
                "a fraction below 1, or start_iters, not both",
                "set one of them to 0",
            )
        if phase.weights:
            _check_weights(data, where, phase.weights)
    starts = phase_starts(data, train_iters)
    for number, start in enumerate(starts):
        expected = "0" if not number else f"a step after {starts[number - 1]} and before {train_iters}"
        if (start != 0) if not number else not starts[number - 1] < start < train_iters:
            raise use_error(
                f"data.curriculum[{number}]", f"a start at step {start}", expected, "sort the phases by their start"
            )


def _check_weights(data: DataConfig, where: str, weights: tuple[float, ...]) -> None:
    if len(weights) != len(data.mixture):
        raise use_error(
            f"{where}.weights",
            f"{len(weights)} weights",
            f"one for each of {len(data.mixture)} sources",
            "list them all",
        )
    if any(source.epochs for source in data.mixture):
        raise use_error(f"{where}.weights", "weights with epochs", "one of the two", "remove the epochs")
    for weight in weights:
        _check_number(f"{where}.weights", weight)
    if not any(weights):
        raise use_error(f"{where}.weights", "no weight above 0", "a source with a weight", "set a weight")


def _check_number(key: str, value: float) -> None:
    if not math.isfinite(value) or value < 0:
        raise use_error(key, value, "a finite number of at least 0", "correct it")
