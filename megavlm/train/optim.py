"""AdamW by component, its schedule, and the step with gradient norms per component.

Megatron-Core's optimizers do the work. Each component is a parameter group of its own; groups are told apart by
Megatron-Core's `lr_mult` key, which its checkpoints match groups by and which nothing else reads.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import param_is_not_shared

from megavlm.checkpoint.native import named_optimizers
from megavlm.config.numerics import compute_dtype
from megavlm.config.schema import OptimizerConfig as OptimizerRecipe
from megavlm.config.schema import Recipe
from megavlm.models.build import DTYPES
from megavlm.models.names import COMPONENTS, component_of, is_adapter
from megavlm.train.parts import Parts

# Values of `lr_mult`; never a factor of anything. LoRA's matrices B, whose rate is another one, have half a tag more.
TAGS: dict[str, float] = {name: float(number) for number, name in enumerate(COMPONENTS, 1)}
_OF_B = 0.5
_RUN = 256
"""Elements of a gradient whose squares are added up in fp32."""


def peak_learning_rates(recipe: OptimizerRecipe) -> dict[str, float]:
    """Peak learning rate of each component."""

    def either(value: float) -> float:
        return recipe.lr if value < 0 else value

    return {"vision": either(recipe.vit_lr), "projector": either(recipe.aligner_lr), "language": recipe.lr}


def build_optimizer(recipe: Recipe, parts: Parts, total_steps: int) -> tuple[ChainedOptimizer, OptimizerParamScheduler]:
    """AdamW with per-component learning rates, no decay of 1-D parameters and of adapters, and its schedule.

    Language model and encoder have an optimizer each, chained: their weights have copies on different sets of ranks,
    over which a distributed optimizer shards its state. Every rank has both, one perhaps without parameters.

    Args:
        recipe: reads `optimizer`, `parallel` and the precision.
        parts: wrapped, frozen parameters already marked.
        total_steps: where the schedule ends.
    """
    knobs, precision = recipe.optimizer, compute_dtype(recipe)
    peaks = peak_learning_rates(knobs)
    config = OptimizerConfig(
        optimizer="adam",
        lr=max(peaks.values()),
        min_lr=knobs.min_lr,
        weight_decay=knobs.weight_decay,
        adam_beta1=knobs.adam_beta1,
        adam_beta2=knobs.adam_beta2,
        adam_eps=knobs.adam_eps,
        clip_grad=knobs.clip_grad,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        params_dtype=DTYPES[precision],
        loss_scale=knobs.loss_scale or None,
        initial_loss_scale=knobs.initial_loss_scale,
        min_loss_scale=knobs.min_loss_scale,
        loss_scale_window=knobs.loss_scale_window,
        hysteresis=knobs.hysteresis,
        use_distributed_optimizer=recipe.parallel.use_distributed_optimizer,
        overlap_param_gather=recipe.parallel.overlap_param_gather,
        log_num_zeros_in_grad=False,
    )
    inner: list[MegatronOptimizer] = []  # in the order of `native.OPTIMIZERS`
    for chunks, collection in ((parts.chunks, parts.groups.language), ((parts.encoder_chunk,), parts.groups.vision)):
        made = get_megatron_optimizer(
            config, list(chunks), _overrides(recipe), use_gloo_process_groups=False, pg_collection=collection
        )
        inner += made.chained_optimizers  # that of the experts, where this rank has any, behind the language model's
    optimizer = ChainedOptimizer(inner)
    warmup = knobs.lr_warmup_iters or math.ceil(knobs.lr_warmup_fraction * total_steps)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=max(peaks.values()),
        min_lr=knobs.min_lr,
        lr_warmup_steps=min(warmup, max(total_steps - 1, 0)),
        lr_decay_steps=max(total_steps, 1),
        lr_decay_style=knobs.lr_decay_style,
        start_wd=knobs.weight_decay,
        end_wd=knobs.weight_decay,
        wd_incr_steps=max(total_steps, 1),
        wd_incr_style="constant",
        wsd_decay_steps=knobs.lr_wsd_decay_iters,
        lr_wsd_decay_style="linear",
    )
    return optimizer, scheduler


def _overrides(recipe: Recipe) -> dict[ParamKey, Any]:
    """Learning rates of each component, those of LoRA's matrices B apart; what is not decayed."""
    knobs, ratio = recipe.optimizer, recipe.peft.lorap_lr_ratio
    overrides: dict[ParamKey, Any] = {}

    def add(name: str, holds: Callable[[torch.nn.Parameter, str], bool], values: dict[str, float]) -> None:
        overrides[ParamKey(with_name_predicate=ParamWithNamePredicate(name, holds))] = values

    for name, peak in peak_learning_rates(knobs).items():
        rates = {"max_lr": peak, "min_lr": min(knobs.min_lr, peak), "lr_mult": TAGS[name]}
        # LoRA+ (arXiv 2402.12354): B learns faster than A, all along the schedule.
        faster = {"max_lr": ratio * peak, "min_lr": ratio * rates["min_lr"], "lr_mult": TAGS[name] + _OF_B}
        add(name, _belongs_to(name, is_b=False), rates)
        add(f"{name}, LoRA's B", _belongs_to(name, is_b=True), faster)
    add("not decayed", lambda parameter, name: parameter.dim() <= 1 or is_adapter(name), {"wd_mult": 0.0})
    return overrides


def _belongs_to(component: str, is_b: bool) -> Callable[[torch.nn.Parameter, str], bool]:
    return lambda _parameter, name: component_of(name) == component and name.endswith(".lora_B") == is_b


@dataclass(frozen=True)
class GradientNorms:
    """Norms of a step's gradients before clipping, the same on every rank.

    `by_component` names the components that learn.
    """

    total: float
    by_component: dict[str, float]


def _live_groups(optimizer: ChainedOptimizer) -> list[dict[str, Any]]:
    """Parameter groups of the optimizers that have parameters on this rank."""
    return [
        group
        for inner in optimizer.chained_optimizers
        if inner.optimizer is not None
        for group in inner.optimizer.param_groups
    ]


def _sum_of_squares(gradient: torch.Tensor) -> torch.Tensor:
    """float64. Short runs are added up in fp32, whose rounding averages out: a float64 copy takes ten times as long."""
    flat = gradient.flatten()
    whole = len(flat) // _RUN * _RUN
    runs = torch.linalg.vector_norm(flat[:whole].view(-1, _RUN), dim=1).double()
    return runs.square().sum() + flat[whole:].double().square().sum()


@torch.no_grad()
def gradient_norms(optimizer: ChainedOptimizer, parts: Parts, components: Sequence[str]) -> GradientNorms:
    """Norms after `prepare_grads`; each gradient counts once, however many ranks hold it."""
    by_tag = {tag: number for number, (name, tag) in enumerate(TAGS.items())}
    squares = torch.zeros(len(TAGS), dtype=torch.float64, device=torch.cuda.current_device())
    for name, inner in named_optimizers(optimizer).items():
        groups = parts.groups.vision if name == "encoder" else parts.groups.language
        copies, tensor = (groups.expt_dp, groups.expt_tp) if name == "experts" else (groups.dp_cp, groups.tp)
        # A distributed optimizer leaves each copy with its own part of the gradients, any other with all of them.
        if inner.optimizer is None or (not inner.config.use_distributed_optimizer and copies.rank() > 0):
            continue
        for group in inner.optimizer.param_groups:
            for parameter in group["params"]:
                counts = param_is_not_shared(parameter) and tensor_parallel.param_is_not_tensor_parallel_duplicate(
                    parameter, tensor
                )
                if counts and parameter.grad is not None:
                    squares[by_tag[math.floor(group["lr_mult"])]] += _sum_of_squares(parameter.grad)
    dist.all_reduce(squares)
    roots = dict(zip(TAGS, squares.sqrt().tolist(), strict=True))
    return GradientNorms(float(squares.sum().sqrt()), {name: roots[name] for name in components})


@torch.no_grad()
def clip_and_update(optimizer: ChainedOptimizer, norms: GradientNorms, clip_grad: float) -> None:
    """Scale gradients to the norm `clip_grad` (0: never) and update the weights."""
    if clip_grad > 0:
        parameters = [parameter for group in _live_groups(optimizer) for parameter in group["params"]]
        if parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=clip_grad, total_norm=norms.total)
    updated = optimizer.step_with_ready_grads()
    assert updated, "the optimizer skipped a step although gradients are finite"


def learning_rates(
    scheduler: OptimizerParamScheduler, recipe: OptimizerRecipe, components: Sequence[str]
) -> dict[str, float]:
    """Learning rate of each component in the next step; also of components that this rank has no parameter of."""
    peaks = peak_learning_rates(recipe)
    return {
        name: float(scheduler.get_lr({"max_lr": peaks[name], "min_lr": min(recipe.min_lr, peaks[name])}))
        for name in components
    }
