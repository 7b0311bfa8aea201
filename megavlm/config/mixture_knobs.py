"""Where training rows are drawn from, in a recipe: entries of `data.mixture`, `.mixture_tasks` and `.curriculum`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MixtureSource:
    """Rows that are mixed with those of other sources: an entry of data.mixture."""

    name: str = ""
    """In messages and logs."""
    paths: tuple[str, ...] = ()
    """Training rows, as data.train names them."""
    weight: float = 1.0
    """Its samples in a global batch are proportional to this (see data.mixture_temperature); 0: none, until
    data.curriculum says otherwise."""
    epochs: float = 0.0
    """How often each of its rows is seen in one of train.num_train_epochs, in place of a weight; for all or none."""
    task: str = ""
    """A name out of data.mixture_tasks."""


@dataclass(frozen=True)
class MixtureTask:
    """What sources of one kind share: an entry of data.mixture_tasks."""

    name: str = ""
    weight: float = 1.0
    """Its samples in a global batch are proportional to this; its sources share them by their own weights."""


@dataclass(frozen=True)
class CurriculumPhase:
    """What is drawn from a point of training on: an entry of data.curriculum."""

    start_iters: int = 0
    """Optimizer steps before it."""
    start_fraction: float = 0.0
    """Or the part of train.train_iters before it, rounded down to a step. Set at most one of the two."""
    weights: tuple[float, ...] = ()
    """One for each entry of data.mixture, in place of its weight; empty: its weight."""
    max_length: int = 0
    """Samples with more tokens are not drawn; 0: all are."""
    order: Literal["default", "length"] = "default"
    """`length`: each pass through a source goes from short to long samples; `default`: as data.shuffle says."""
