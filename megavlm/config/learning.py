"""What learns from when on, and how fast by depth: the notation of `optimizer.unfreeze`, and checks of such knobs."""

import math
import re
from dataclasses import dataclass

from megavlm.config.facts import ModelFacts
from megavlm.config.schema import Recipe
from megavlm.config.tuning import COMPONENTS, tuning_plan
from megavlm.errors import use_error

_KEY = "optimizer.unfreeze"
_EXAMPLE = "write e.g. 0: projector; 0.1: vision[-2:]; 0.3: vision; 2000: language"
_ENTRY = re.compile(r"\s*(\d+|\d*\.\d+|\d+\.\d*)\s*:(.+)", re.DOTALL)
_SELECTION = re.compile(r"\s*(\w+)\s*(?:\[\s*(-?\d+)?\s*:\s*(-?\d+)?\s*\])?\s*")
_KNOBS = {
    "vision": ("freeze_vit", "vit_layer_decay", "vit_clip_grad"),
    "projector": ("freeze_aligner", None, "aligner_clip_grad"),
    "language": ("freeze_llm", "llm_layer_decay", None),
}


@dataclass(frozen=True)
class Selection:
    """A component, or layers `start` up to `end` of it, counted from its end where they are negative.

    Attributes:
        component: vision, projector or language.
        start: None with `end` None: the whole component, also what is in no layer.
        end: behind the last layer.
    """

    component: str
    start: int | None = None
    end: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the component."""
        return self.start is None and self.end is None

    def layers(self, num_layers: int) -> range:
        """The layers of a component that has so many."""
        return range(num_layers)[slice(self.start, self.end)]

    def holds(self, component: str, layer: int | None, num_layers: int) -> bool:
        """Whether it speaks of a layer; None: of what is in no layer."""
        return component == self.component and (
            self.is_whole or (layer is not None and layer in self.layers(num_layers))
        )

    def __str__(self) -> str:
        if self.is_whole:
            return self.component
        start, end = ("" if bound is None else str(bound) for bound in (self.start, self.end))
        return f"{self.component}[{start}:{end}]"


@dataclass(frozen=True)
class UnfreezeEntry:
    """What learns from a point of the run on.

    Attributes:
        point: steps done by then, or (float) the share of the run.
        selections: what begins to learn.
    """

    point: int | float
    selections: tuple[Selection, ...]

    def first_step(self, total_steps: int) -> int:
        """Optimizer steps before it, in a run of so many; shares are rounded down to a step."""
        return self.point if isinstance(self.point, int) else math.floor(self.point * total_steps + 1e-9)


def parse_unfreeze(text: str) -> tuple[UnfreezeEntry, ...]:
    """Read `optimizer.unfreeze`: `point: component, component[start:end]; point: ...`.

    A whole number is a number of optimizer steps, one with a decimal point a share of them.

    Raises:
        UseError: it is not in its notation.
    """
    entries = []
    for part in text.split(";") if text.strip() else []:
        where = f"{_KEY} `{part.strip()}`"
        match = _ENTRY.fullmatch(part)
        if match is None:
            raise use_error(where, "something else", "point: component, component[start:end]", _EXAMPLE)
        point = float(match[1]) if "." in match[1] else int(match[1])
        if isinstance(point, float) and point >= 1:
            raise use_error(where, f"share {point} of the run", "a share below 1, or a whole number of steps", _EXAMPLE)
        entries.append(UnfreezeEntry(point, tuple(_selection(one, where) for one in match[2].split(","))))
    return tuple(entries)


def _selection(text: str, where: str) -> Selection:
    match = _SELECTION.fullmatch(text)
    if match is None or match[1] not in COMPONENTS:
        raise use_error(
            where, f"`{text.strip()}`", f"one of {', '.join(COMPONENTS)}, with or without [start:end]", _EXAMPLE
        )
    if "[" not in text:
        return Selection(match[1])
    if match[1] == "projector":
        raise use_error(where, "a range of layers of the projector", "projector without a range", _EXAMPLE)
    start, end = (int(bound) if bound else None for bound in (match[2], match[3]))
    return Selection(match[1], 0 if start is None and end is None else start, end)


def unfrozen_by(recipe: Recipe, total_steps: int, step: int) -> list[list[str | int]]:
    """What has begun to learn within the first steps of a run, but not at its start: (step, what), for checkpoints."""
    entries = [(entry.first_step(total_steps), entry.selections) for entry in parse_unfreeze(recipe.optimizer.unfreeze)]
    return sorted([first, str(one)] for first, selections in entries if 0 < first < step for one in selections)


def check_learning(recipe: Recipe) -> None:
    """Check knobs of what learns when and how fast, as far as the recipe alone can tell.

    Raises:
        UseError: a knob is out of bounds, or set where nothing reads it; something that learns is never unfrozen.
    """
    optimizer, learning = recipe.optimizer, [name for name in COMPONENTS if tuning_plan(recipe).learns(name)]
    for name in ("vit_layer_decay", "llm_layer_decay"):
        if not 0 < vars(optimizer)[name] <= 1:
            raise use_error(
                f"optimizer.{name}", vars(optimizer)[name], "above 0 and at most 1", f"set optimizer.{name}=0.9"
            )
    for name in ("vit_clip_grad", "aligner_clip_grad"):
        if vars(optimizer)[name] >= 0 and optimizer.clip_grad_by == "total":
            raise use_error(
                f"optimizer.{name}",
                f"{vars(optimizer)[name]} with clip_grad_by total",
                "clip_grad_by component or layer",
                f"set optimizer.clip_grad_by=component, or remove {name}",
            )
    for component, (freeze, decay, clip) in _KNOBS.items():
        unread = [decay] if decay and vars(optimizer)[decay] != 1 else []
        unread += [clip] if clip and vars(optimizer)[clip] >= 0 else []
        if unread and component not in learning:
            raise use_error(
                f"optimizer.{unread[0]}",
                f"{vars(optimizer)[unread[0]]} with {freeze} true (or {component}: frozen)",
                "no such knob for what is frozen",
                f"remove optimizer.{unread[0]}, or let {component} learn",
            )
    _check_unfreeze(recipe, learning)


def _check_unfreeze(recipe: Recipe, learning: list[str]) -> None:
    optimizer, entries = recipe.optimizer, parse_unfreeze(recipe.optimizer.unfreeze)
    if not entries:
        if optimizer.unfreeze_warmup_iters:
            raise use_error(
                "optimizer.unfreeze_warmup_iters",
                f"{optimizer.unfreeze_warmup_iters} without optimizer.unfreeze",
                "something that is unfrozen later",
                "use lr_warmup_iters, or set optimizer.unfreeze",
            )
        return
    selections = [one for entry in entries for one in entry.selections]
    frozen = [one for one in selections if one.component not in learning]
    if frozen:
        raise use_error(
            _KEY,
            f"`{frozen[0]}`, which never learns",
            f"only what learns: {', '.join(learning)}",
            f"set {_KNOBS[frozen[0].component][0]}=false, or take it out",
        )
    for component in learning:
        if Selection(component) not in selections:
            raise use_error(
                _KEY,
                f"no point from which all of `{component}` learns",
                "one for every component that is not frozen",
                f"add e.g. `; 0: {component}`, or freeze it by {_KNOBS[component][0]} or peft.components",
            )
    if all(entry.point > 0 for entry in entries):
        raise use_error(_KEY, f"nothing before {entries[0].point}", "something that learns from 0 on", _EXAMPLE)
    late = [entry.point for entry in entries if isinstance(entry.point, int)]
    if 0 < recipe.train.train_iters <= max(late, default=0):
        raise use_error(
            _KEY,
            f"step {max(late)} in a run of {recipe.train.train_iters}",
            f"points before step {recipe.train.train_iters}",
            "unfreeze earlier, or raise train.train_iters",
        )


def check_unfrozen_layers(recipe: Recipe, facts: ModelFacts) -> None:
    """Check that the layers that `optimizer.unfreeze` names are there.

    Raises:
        UseError: a range holds none, or reaches beyond the model.
    """
    counts = {"vision": facts.vision_num_layers, "language": facts.num_layers}
    for entry in parse_unfreeze(recipe.optimizer.unfreeze):
        for one in entry.selections:
            num_layers = counts.get(one.component, 0)
            bounds = [bound for bound in (one.start, one.end) if bound is not None]
            if bounds and (any(abs(bound) > num_layers for bound in bounds) or not one.layers(num_layers)):
                raise use_error(
                    _KEY, f"`{one}`", f"some of the {num_layers} layers of `{one.component}`", "correct the range"
                )
