"""What is tuned, and how: a component, or a range of its layers, at a time."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from megavlm.config.load import recipe_to_dict
from megavlm.config.numerics import FP8_PRECISIONS, compute_dtype
from megavlm.config.peft import PeftConfig
from megavlm.config.schema import Recipe
from megavlm.errors import use_error

Method = Literal["full", "frozen", "lora", "ia3", "adapter", "parallel_adapter", "cross_modal_adapter", "prefix"]
BOTTLENECKS = ("adapter", "parallel_adapter", "cross_modal_adapter")
ADAPTERS = ("lora", "ia3", *BOTTLENECKS, "prefix")
"""Methods that learn something beside the model's own weights."""
COMPONENTS = ("vision", "projector", "language")

_RULE = re.compile(r"\s*(\w+)\s*(?:\[\s*(\d*)\s*:\s*(\d*)\s*\])?\s*:\s*(\w+)((?:\s+\w+\s*=\s*[\d.]+)*)\s*")
_KNOB = re.compile(r"(\w+)\s*=\s*([\d.]+)")
_EXAMPLE = "write e.g. vision: frozen, projector: full, language[0:16]: lora r=8 alpha=16, language[16:32]: frozen"


@dataclass(frozen=True)
class Tuning:
    """How one layer learns.

    Attributes:
        method: of learning.
        rank: of `lora`.
        alpha: of `lora`.
        size: inner width of an adapter, or number of a prefix's keys.
    """

    method: Method
    rank: int = 0
    alpha: float = 0.0
    size: int = 0


@dataclass(frozen=True)
class Rule:
    """An entry of `components`: layers `start` up to `end` of a component; without either the whole of it."""

    component: str
    start: int | None
    end: int | None
    tuning: Tuning

    def holds(self, component: str, layer: int | None) -> bool:
        """Whether it speaks of a layer; None: of what is in no layer."""
        if component != self.component:
            return False
        if self.start is None and self.end is None:
            return True
        return layer is not None and (self.start or 0) <= layer and (self.end is None or layer < self.end)


@dataclass(frozen=True)
class TuningPlan:
    """How everything learns; of several rules that hold the last counts."""

    rules: tuple[Rule, ...]

    def of(self, component: str, layer: int | None) -> Tuning:
        """How a layer (None: what is in no layer) of a component learns."""
        for rule in reversed(self.rules):
            if rule.holds(component, layer):
                return rule.tuning
        return Tuning("frozen")

    def learns(self, component: str) -> bool:
        """Whether any of a component does."""
        return any(rule.component == component and rule.tuning.method != "frozen" for rule in self.rules)

    @property
    def has_adapters(self) -> bool:
        """Whether something is learned beside the model's own weights."""
        return any(rule.tuning.method in ADAPTERS for rule in self.rules)


def tuning_plan(recipe: Recipe) -> TuningPlan:
    """How everything learns under a recipe.

    Raises:
        UseError: `peft.components` is not in its notation.
    """
    peft, optimizer = recipe.peft, recipe.optimizer
    frozen = {"vision": optimizer.freeze_vit, "projector": optimizer.freeze_aligner, "language": optimizer.freeze_llm}
    rules = [
        Rule(name, None, None, Tuning("frozen") if frozen[name] else _tuning(peft, peft.tuner_type, {}, ""))
        for name in COMPONENTS
    ]
    named = parse_components(peft)
    mentioned = {rule.component for rule in named}
    return TuningPlan((*(rule for rule in rules if rule.component not in mentioned), *named))


def parse_components(peft: PeftConfig) -> tuple[Rule, ...]:
    """Read `components`.

    Raises:
        UseError: it is not in its notation.
    """
    rules = []
    for text in peft.components.split(",") if peft.components.strip() else []:
        match = _RULE.fullmatch(text)
        where = f"peft.components `{text.strip()}`"
        if match is None:
            raise use_error(where, "something else", "component[start:end]: method knob=number", _EXAMPLE)
        component, start, end, method, knobs = match.groups()
        if component not in COMPONENTS:
            raise use_error(where, f"component {component}", f"one of {', '.join(COMPONENTS)}", _EXAMPLE)
        if method not in get_args(Method):
            raise use_error(where, f"method {method}", f"one of {', '.join(get_args(Method))}", _EXAMPLE)
        if start is not None and component == "projector":
            raise use_error(where, "a range of layers of the projector", "projector without a range", _EXAMPLE)
        first, last = (int(bound) if bound else None for bound in (start, end))
        if start is not None and first is None and last is None:
            first = 0
        if first is not None and last is not None and first >= last:
            raise use_error(where, f"layers {first} to {last}", "a start below the end", _EXAMPLE)
        rules.append(Rule(component, first, last, _tuning(peft, method, dict(_KNOB.findall(knobs)), where)))
    return tuple(rules)


_SHORT = {
    "r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "adapter_size": "size",
    "num_virtual_tokens": "size",
    "tokens": "size",
}


def _tuning(peft: PeftConfig, method: str, knobs: Mapping[str, str], where: str) -> Tuning:
    """A method with its knobs, those of the section where an entry has none."""
    defaults: dict[str, dict[str, float]] = {
        "lora": {"rank": peft.lora_rank, "alpha": peft.lora_alpha},
        **dict.fromkeys(BOTTLENECKS, {"size": peft.adapter_size}),
        "prefix": {"size": peft.num_virtual_tokens},
    }
    values = dict(defaults.get(method, {}))
    for name, text in knobs.items():
        key = _SHORT.get(name, name)
        if key not in values:
            raise use_error(where, f"knob {name}", f"{method} with {', '.join(values) or 'no knob'}", _EXAMPLE)
        values[key] = _number(text, where)
    for key in {"rank", "size"} & set(values):
        if values[key] < 1 or values[key] % 1:
            raise use_error(where or f"peft ({method})", values[key], "a whole number of at least 1", _EXAMPLE)
    return Tuning(
        method,  # type: ignore[arg-type]
        rank=int(values.get("rank", 0)),
        alpha=values.get("alpha", 0.0),
        size=int(values.get("size", 0)),
    )


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise use_error(where, text, "a number", _EXAMPLE) from error


def describe_tuning(recipe: Recipe) -> dict[str, Any]:
    """The parts of a recipe that say which weights learn, in plain types; empty where there are no adapters.

    `load.recipe_from_dict` makes a recipe of them whose `tuning_plan` is the same.
    """
    if not tuning_plan(recipe).has_adapters:
        return {}
    frozen = {name: vars(recipe.optimizer)[name] for name in _FREEZE.values()}
    tuning = {"peft": recipe_to_dict(recipe)["peft"], "optimizer": frozen}
    return tuning | {"train": {"precision": compute_dtype(recipe)}}


_FREEZE = {"vision": "freeze_vit", "projector": "freeze_aligner", "language": "freeze_llm"}
_LEARNING_RATES = {"vision": "vit_lr", "projector": "aligner_lr"}


def check_tuning(recipe: Recipe) -> None:
    """Check what the recipe alone can tell.

    Raises:
        UseError: nothing learns, a component is spoken of twice, or a knob is set that nothing reads.
    """
    peft, plan = recipe.peft, tuning_plan(recipe)
    for component in {rule.component for rule in parse_components(peft)}:
        name = _FREEZE[component]
        if vars(recipe.optimizer)[name]:
            raise use_error(
                f"optimizer.{name}",
                f"true with peft.components that speak of {component}",
                "one of the two",
                f"remove optimizer.{name}, or write {component}: frozen",
            )
    learning = [component for component in COMPONENTS if plan.learns(component)]
    if not learning:
        raise use_error(
            "optimizer.freeze_llm",
            "vision tower, projector and language model all frozen",
            "something to train",
            "set one of freeze_vit, freeze_aligner, freeze_llm to false, or change peft.components",
        )
    for component, name in _LEARNING_RATES.items():
        if component not in learning and vars(recipe.optimizer)[name] >= 0:
            raise use_error(
                f"optimizer.{name}",
                f"{vars(recipe.optimizer)[name]} with {_FREEZE[component]} true (or {component}: frozen)",
                "no learning rate for what is frozen",
                f"set optimizer.{name}=-1 or let {component} learn",
            )
    for rule in plan.rules:
        if rule.tuning.method == "cross_modal_adapter" and rule.component != "language":
            raise use_error(
                "peft",
                f"{rule.component}: cross_modal_adapter",
                "language: cross_modal_adapter, where there are words as well as images",
                "set e.g. peft.components=vision: adapter, projector: full, language: cross_modal_adapter",
            )
    methods = {rule.tuning.method for rule in plan.rules}
    defaults = PeftConfig()
    for name, readers in _READ_BY.items():
        if vars(peft)[name] != vars(defaults)[name] and not methods & set(readers):
            raise use_error(
                f"peft.{name}",
                vars(peft)[name],
                f"{' or '.join(readers)} somewhere in the model",
                f"set peft.tuner_type={readers[0]}, or remove {name}",
            )
    _check_across_ranks(recipe)
    _check_quantization(recipe, plan)
    if recipe.model.backend == "te" and plan.has_adapters:
        _check_transformer_engine(recipe, plan)


# Knobs, and the methods that read them.
_READ_BY: dict[str, tuple[str, ...]] = {
    "lora_dropout": ("lora",),
    "use_rslora": ("lora",),
    "use_dora": ("lora",),
    "lorap_lr_ratio": ("lora",),
    "target_modules": ("lora", "ia3"),
    "adapters": ("lora", "ia3", "prefix"),
    "adapter_size": BOTTLENECKS,
    "num_virtual_tokens": ("prefix",),
}


def _check_quantization(recipe: Recipe, plan: TuningPlan) -> None:
    peft = recipe.peft
    if peft.bnb_4bit_quant_type == "none":
        return
    if recipe.train.precision in FP8_PRECISIONS:
        raise use_error(
            "peft.bnb_4bit_quant_type",
            f"{peft.bnb_4bit_quant_type} with train.precision {recipe.train.precision}",
            "bf16: a matrix in 4 bits is multiplied in the precision that it is made in",
            "set train.precision=bf16, or bnb_4bit_quant_type=none",
        )
    unknown = [name for name in peft.quantized_components if name not in COMPONENTS]
    if unknown:
        raise use_error(
            "peft.quantized_components", f"`{unknown[0]}`", f"any of {', '.join(COMPONENTS)}", "correct the name"
        )
    frozen = [rule.component for rule in plan.rules if rule.tuning.method != "full"]
    if not plan.has_adapters or not set(frozen) & set(peft.quantized_components):
        raise use_error(
            "peft.bnb_4bit_quant_type",
            f"{peft.bnb_4bit_quant_type}, and nothing in {', '.join(peft.quantized_components)} is frozen",
            "adapters beside frozen weights",
            "set peft.tuner_type=lora, or bnb_4bit_quant_type=none",
        )


def _check_transformer_engine(recipe: Recipe, plan: TuningPlan) -> None:
    """What has no place in Transformer Engine's modules. Grouped experts are found when the model is there."""
    if any(rule.tuning.method == "prefix" for rule in plan.rules):
        raise use_error(
            "model.backend",
            "te with peft prefix",
            "torch or flash: Transformer Engine's attention takes no keys of its own",
            "set model.backend=torch",
        )
    if recipe.peft.bnb_4bit_quant_type != "none":
        raise use_error(
            "peft.bnb_4bit_quant_type",
            f"{recipe.peft.bnb_4bit_quant_type} with model.backend te",
            "torch or flash: Transformer Engine's linears multiply by whole matrices",
            "set model.backend=flash",
        )
    if recipe.fp8.fp8_param_gather:
        raise use_error(
            "fp8.fp8_param_gather",
            "true with peft",
            "false: weights beside adapters are frozen, and gathered never",
            "set fp8.fp8_param_gather=false",
        )


def _check_across_ranks(recipe: Recipe) -> None:
    dropout, context = recipe.peft.lora_dropout, recipe.parallel.context_parallel_size
    if dropout > 0 and context > 1:
        raise use_error(
            "peft.lora_dropout",
            f"{dropout} with context_parallel_size {context}",
            "no dropout under context parallelism",
            "set peft.lora_dropout=0 or parallel.context_parallel_size=1",
        )
    prefix = any(rule.tuning.method == "prefix" for rule in tuning_plan(recipe).rules)
    if prefix and context > 1 and recipe.parallel.cp_comm_type == "p2p":
        raise use_error(
            "parallel.cp_comm_type",
            "p2p with peft prefix",
            "all_gather: a ring passes keys of tokens only",
            "set parallel.cp_comm_type=all_gather",
        )
    if not recipe.peft.target_modules:
        raise use_error("peft.target_modules", "nothing", "names of linears", "set peft.target_modules=all-linear")
