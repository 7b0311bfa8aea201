"""Which linear layers of a model are in FP8, and their emulation on machines without FP8."""

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megavlm.config.numerics import fp8_recipes
from megavlm.config.precision import Fp8Config
from megavlm.config.schema import Recipe
from megavlm.errors import use_error
from megavlm.models.architecture import Architecture
from megavlm.models.names import Part, component_of, global_name
from megavlm.parallel.groups import Groups
from megavlm.precision.linear import DelayedScale, Fp8Knobs, Fp8Linear, Quantisers, quantisers_of

_LAYER = re.compile(r"(language\.decoder|vision\.block)\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.local_experts\.")
# As in Megatron: logits are computed in the precision of the activations.
_NEVER = "language.output_layer"


def fp8_settings(component: str, recipe: Recipe) -> dict[str, Any]:
    """Megatron-Core's knobs of FP8 for a component that Transformer Engine computes; none where it is not in FP8."""
    chosen, fp8 = fp8_recipes(recipe).get(component), recipe.fp8
    if recipe.train.precision != "fp8" or chosen is None:
        return {}
    return {
        "fp8": fp8.fp8_format,
        "fp8_recipe": chosen,
        "fp8_param": fp8.fp8_param_gather,
        "fp8_margin": fp8.fp8_margin,
        "fp8_amax_history_len": fp8.fp8_amax_history_len,
        "fp8_amax_compute_algo": fp8.fp8_amax_compute_algo,
        "first_last_layers_bf16": fp8.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": fp8.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": fp8.num_layers_at_end_in_bf16,
    }


def linears(part: Part) -> Iterator[tuple[str, ColumnParallelLinear | RowParallelLinear]]:
    """The parallel linear layers of a part that FP8 concerns, by their global names."""
    for name, module in part.named_modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear) and name != _NEVER:
            yield global_name(part, f"{name}.weight").removesuffix(".weight"), module


def is_first_or_last(name: str, fp8: Fp8Config, architecture: Architecture) -> bool:
    """Whether a linear layer lies in one of the first or last layers, which the recipe keeps in bf16."""
    match = _LAYER.match(name)
    if match is None or not fp8.first_last_layers_bf16:
        return False
    is_decoder = match[1] == "language.decoder"
    num_layers = architecture.language.num_layers if is_decoder else architecture.vision.num_computed_layers
    number = int(match[2])
    return number < fp8.num_layers_at_start_in_bf16 or number >= num_layers - fp8.num_layers_at_end_in_bf16


@dataclass
class EmulatedFp8:
    """The linear layers of this rank that are emulated, and their histories.

    Attributes:
        layers: quantisers by the global name of the layer, language model's first; what tensor-parallel and data ranks
            hold is in the same order.
        groups: process groups.
        names_met: patterns of `fp8_exempt` that met a layer of this rank.
    """

    groups: Groups
    layers: dict[str, Quantisers] = field(default_factory=dict)
    names_met: set[str] = field(default_factory=set)

    def add(self, part: Part, recipes: Mapping[str, str], fp8: Fp8Config, architecture: Architecture) -> None:
        """Have the linear layers of a part computed in FP8."""
        knobs = Fp8Knobs(
            is_hybrid=fp8.fp8_format == "hybrid",
            margin=fp8.fp8_margin,
            history_length=fp8.fp8_amax_history_len,
            uses_max=fp8.fp8_amax_compute_algo == "max",
        )
        assert "_forward_impl" in vars(ColumnParallelLinear) and "_forward_impl" in vars(RowParallelLinear)
        for name, module in linears(part):
            met = {pattern for pattern in fp8.fp8_exempt if fnmatch.fnmatchcase(name, pattern)}
            self.names_met |= met
            recipe = recipes.get(component_of(name))
            if met or recipe is None or is_first_or_last(name, fp8, architecture):
                continue
            self.layers[name] = quantisers_of(recipe, knobs, module.tp_group)
            vars(module)["_forward_impl"] = Fp8Linear(self.layers[name], module.tp_group)

    def check_patterns(self, patterns: Sequence[str]) -> None:
        """Every rank calls this, with the same patterns.

        Raises:
            UseError: one of them meets no linear layer of the whole model.
        """
        if not patterns:
            return
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, sorted(self.names_met))
        unmet = sorted(set(patterns).difference(*everyones))
        if unmet:
            raise use_error(
                "fp8.fp8_exempt",
                f"`{unmet[0]}`",
                "a pattern of names of linear layers, e.g. language.decoder.layers.0.* or projector.*",
                "correct it (layers count from 0)",
            )

    @property
    def delayed(self) -> dict[str, DelayedScale]:
        """What has a history, by layer and operand."""
        return {
            f"{name}.{operand}": scale
            for name, quantisers in self.layers.items()
            for operand, scale in vars(quantisers).items()
            if isinstance(scale, DelayedScale)
        }

    def end_step(self) -> None:
        """Move histories on by the largest values of all ranks; every rank calls this once a step."""
        language, vision = self.groups.language, self.groups.vision
        for collection, is_encoder, is_expert in (
            ((language.tp, language.dp_cp), False, False),
            ((language.expt_tp, language.expt_dp), False, True),
            ((vision.tp, vision.dp_cp), True, False),
        ):
            scales = [
                scale
                for name, scale in self.delayed.items()
                if (component_of(name) != "language") == is_encoder and bool(_EXPERT.search(name)) == is_expert
            ]
            if not scales:
                continue
            device = torch.device(torch.cuda.current_device())
            amaxes = torch.stack([scale.amax.to(device) for scale in scales])
            for group in collection:
                if group.size() > 1:
                    dist.all_reduce(amaxes, op=dist.ReduceOp.MAX, group=group)
            for scale, amax in zip(scales, amaxes.tolist(), strict=True):
                scale.end_step(amax)

    def state(self) -> dict[str, tuple[float, list[float]]]:
        """Scale and history of everything that has one, of all ranks; every rank calls this."""
        own = {name: (scale.scale, list(scale.history)) for name, scale in self.delayed.items()}
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, own)
        return {name: value for one in everyones for name, value in one.items()}

    def restore(self, state: Mapping[str, tuple[float, list[float]]]) -> None:
        """Go on with saved histories; what has none begins anew (the recipe was another one)."""
        for name, scale in self.delayed.items():
            if name in state:
                scale.scale, scale.history = state[name][0], list(state[name][1])
