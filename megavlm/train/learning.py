"""What learns alike: groups of parameters by component, layer, and the step from which they learn.

Layer-wise rates: Clark et al., ELECTRA (arXiv 2003.10555), appendix B; places of layers as in Bao et al., BEiT
(arXiv 2106.08254), code at microsoft/unilm, beit/optim_factory.py. Gradual unfreezing: Howard & Ruder, ULMFiT
(arXiv 1801.06146), section 3.3.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from megavlm.checkpoint.hf_load import tied_name
from megavlm.config.learning import parse_unfreeze
from megavlm.config.schema import OptimizerConfig, Recipe
from megavlm.models.architecture import Architecture
from megavlm.models.names import Part, component_of, layer_of, named_parameters

# What lies below the first layer, by the beginnings of global names.
_BELOW = (
    "language.embedding.",
    "vision.patch_embed.",
    "vision.class_embedding",
    "vision.position_table.",
    "vision.pre_norm.",
)


@dataclass(frozen=True)
class LearningGroup:
    """Parameters that learn alike.

    Attributes:
        component: vision, projector or language.
        level: 0 below the layers, then the layers from 1 on, then what is above them; None: whatever the layer.
        is_lora_b: whether they are LoRA's matrices B, whose rate may be another one.
        max_lr: peak learning rate.
        min_lr: where the schedule ends.
        first_step: optimizer steps of the run before they learn.
        unit: whose gradients are clipped together with theirs.
        clip_grad: norm to which these are clipped; 0: not at all.
    """

    component: str
    level: int | None
    is_lora_b: bool
    max_lr: float
    min_lr: float
    first_step: int
    unit: str
    clip_grad: float


@dataclass(frozen=True)
class Learning:
    """The groups of a run, the same on every rank, and which of this rank's parameters belong to which.

    Attributes:
        groups: every one that there might be, in an order that depends on the recipe and the model alone.
        of: this rank's parameters, those that learn.
        warmup_iters: steps over which the rate of what is unfrozen later rises.
    """

    groups: tuple[LearningGroup, ...]
    of: Mapping[torch.nn.Parameter, LearningGroup]
    warmup_iters: int

    @functools.cached_property
    def tags(self) -> dict[LearningGroup, float]:
        """A number for each group: Megatron-Core's `lr_mult`, which nothing else reads."""
        return {group: float(number) for number, group in enumerate(self.groups, 1)}

    def tagged(self, tag: float) -> LearningGroup:
        """The group of a tag."""
        return self.groups[int(tag) - 1]

    @property
    def first_steps(self) -> tuple[int, ...]:
        """Steps at which something begins to learn."""
        return tuple(sorted({group.first_step for group in self.groups}))

    def rate_factor(self, group: LearningGroup, step: int) -> float:
        """What a group's rate in a step (from 0) is of the schedule's: 0 until it learns, then its own warm-up."""
        since = step - group.first_step
        if since < 0:
            return 0.0
        if group.first_step == 0 or self.warmup_iters == 0:  # from the start on there is the run's own warm-up
            return 1.0
        return min(1.0, (since + 1) / self.warmup_iters)


def peak_learning_rates(recipe: OptimizerConfig) -> dict[str, float]:
    """Peak learning rate of each component."""

    def either(value: float) -> float:
        return recipe.lr if value < 0 else value

    return {"vision": either(recipe.vit_lr), "projector": either(recipe.aligner_lr), "language": recipe.lr}


def num_layers_of(architecture: Architecture) -> dict[str, int]:
    """Layers of each component that are told apart."""
    vision, language = architecture.vision.num_computed_layers, architecture.language.num_layers
    return {"vision": vision, "projector": 0, "language": language}


def learning_of(recipe: Recipe, architecture: Architecture, parts: Iterable[Part], total_steps: int) -> Learning:
    """The groups of a run of `total_steps`; `parts` are this rank's, frozen parameters already marked."""
    tables = {
        name: _groups(recipe, name, num_layers, total_steps) for name, num_layers in num_layers_of(architecture).items()
    }
    of = {}
    for part in parts:
        for name, parameter in named_parameters(part):
            if parameter.requires_grad:
                component = component_of(name)
                table, num_layers = tables[component], num_layers_of(architecture)[component]
                key = None if (None, False) in table else _level(tied_name(name, part), num_layers)
                of[parameter] = table[key, name.endswith(".lora_B")]
    groups = tuple(group for table in tables.values() for group in table.values())
    return Learning(groups, of, recipe.optimizer.unfreeze_warmup_iters)


def _level(name: str, num_layers: int) -> int:
    """Where a parameter is: 0 below the layers, then the layers from 1 on, then above; `name` is global."""
    layer = layer_of(name)
    if layer is not None:
        return layer + 1
    return 0 if name.startswith(_BELOW) else num_layers + 1


def _groups(
    recipe: Recipe, component: str, num_layers: int, total_steps: int
) -> dict[tuple[int | None, bool], LearningGroup]:
    """A component's groups by level and whether they are LoRA's B."""
    knobs = recipe.optimizer
    decay = {"vision": knobs.vit_layer_decay, "language": knobs.llm_layer_decay}.get(component, 1.0)
    starts = [
        (entry.first_step(total_steps), selection)
        for entry in parse_unfreeze(knobs.unfreeze)
        for selection in entry.selections
        if selection.component == component
    ]
    tells_apart = decay != 1 or knobs.clip_grad_by == "layer" or any(not one.is_whole for _, one in starts)
    levels: list[int | None] = list(range(num_layers + 2)) if tells_apart else [None]
    peak = peak_learning_rates(knobs)[component]
    own_limit = {"vision": knobs.vit_clip_grad, "projector": knobs.aligner_clip_grad}.get(component, -1.0)
    table = {}
    for level in levels:
        layer = level - 1 if level is not None and 1 <= level <= num_layers else None
        depth = 0 if level is None else num_layers + 1 - level
        first_step = min((step for step, one in starts if one.holds(component, layer, num_layers)), default=0)
        unit = {"total": "", "component": component, "layer": component if layer is None else f"{component}.{layer}"}
        for is_lora_b in (False, True):
            # LoRA+ (arXiv 2402.12354): B learns faster than A, all along the schedule.
            factor = decay**depth * (recipe.peft.lorap_lr_ratio if is_lora_b else 1.0)
            table[level, is_lora_b] = LearningGroup(
                component,
                level,
                is_lora_b,
                max_lr=factor * peak,
                min_lr=factor * min(knobs.min_lr, peak),
                first_step=first_step,
                unit=unit[knobs.clip_grad_by],
                clip_grad=knobs.clip_grad if own_limit < 0 else own_limit,
            )
    return table


def hide_gradients(learning: Learning, step: int) -> None:
    """Zero the gradients of what does not learn yet in a step (from 0): norms, limits and overflows miss it."""
    for parameter, group in learning.of.items():
        if group.first_step > step:
            vars(parameter)["main_grad"].zero_()
