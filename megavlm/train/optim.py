"""AdamW by component and layer, its schedule, and the step with gradient norms per component.

Megatron-Core's optimizers do the work. What learns alike (`learning.py`) is a parameter group; groups are told apart by
Megatron-Core's `lr_mult` key, which its checkpoints match groups by and which nothing else reads.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
from megavlm.config.schema import ParallelConfig, Recipe
from megavlm.errors import use_error
from megavlm.models.build import DTYPES
from megavlm.models.names import is_adapter
from megavlm.train.learning import Learning, LearningGroup, peak_learning_rates
from megavlm.train.parts import Parts

_RUN = 256
"""Elements of a gradient whose squares are added up in fp32."""


def build_optimizer(
    recipe: Recipe, parts: Parts, learning: Learning, total_steps: int
) -> tuple[ChainedOptimizer, OptimizerParamScheduler]:
    """AdamW with the rates of each group, no decay of 1-D parameters and of adapters, and its schedule.

    Language model and encoder have an optimizer each, chained: their weights have copies on different sets of ranks,
    over which a distributed optimizer shards its state. Every rank has both, one perhaps without parameters.

    Args:
        recipe: reads `optimizer`, `parallel` and the precision.
        parts: wrapped, frozen parameters already marked.
        learning: groups of the run.
        total_steps: where the schedule ends.

    Raises:
        UseError: something is unfrozen later, and Adam's kernel counts steps for all parameters together.
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
        **_offloaded(recipe.parallel),
    )
    inner: list[MegatronOptimizer] = []  # in the order of `native.OPTIMIZERS`
    for chunks, collection in ((parts.chunks, parts.groups.language), ((parts.encoder_chunk,), parts.groups.vision)):
        made = get_megatron_optimizer(
            config, list(chunks), _overrides(learning), use_gloo_process_groups=False, pg_collection=collection
        )
        inner += made.chained_optimizers  # that of the experts, where this rank has any, behind the language model's
    optimizer = ChainedOptimizer(inner)
    if len(learning.first_steps) > 1 and any(isinstance(one.optimizer, torch.optim.AdamW) for one in inner):
        raise use_error(
            "optimizer.unfreeze",
            f"`{knobs.unfreeze}` with torch's AdamW, whose checkpoints count steps for all parameters together",
            "the fused Adam of Transformer Engine or apex",
            "install one of them, or start a run for each stage",
        )
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


def _offloaded(parallel: ParallelConfig) -> dict[str, Any]:
    """Knobs of an optimizer in CPU memory.

    Only with a "precision-aware" optimizer are main weights there, too: its parameters are the weights themselves, and
    gradients stand beside them as `decoupled_grad`, since they are of another type (megatron-core 0.16.1,
    optimizer/distrib_optimizer.py:2411).
    """
    if not parallel.optimizer_cpu_offload:
        return {}
    return {
        "use_precision_aware_optimizer": True,
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": parallel.optimizer_offload_fraction,
        "overlap_cpu_optimizer_d2h_h2d": parallel.overlap_cpu_optimizer_d2h_h2d,
    }


def _gradient_of(parameter: torch.Tensor, decoupled: bool) -> torch.Tensor | None:
    """Where an optimizer reads a gradient (see `_offloaded`)."""
    gradient: torch.Tensor | None = vars(parameter).get("decoupled_grad") if decoupled else parameter.grad
    return gradient


def _overrides(learning: Learning) -> dict[ParamKey, Any]:
    """Rates of each group that this rank has parameters of, and what is not decayed."""
    overrides: dict[ParamKey, Any] = {}

    def add(name: str, holds: Callable[[torch.nn.Parameter, str], bool], values: dict[str, float]) -> None:
        overrides[ParamKey(with_name_predicate=ParamWithNamePredicate(name, holds))] = values

    held = set(learning.of.values())
    for group, tag in learning.tags.items():
        if group in held:
            rates = {"max_lr": group.max_lr, "min_lr": group.min_lr, "lr_mult": tag}
            add(f"group {tag:g}", _belongs_to(learning, group), rates)
    add("not decayed", lambda parameter, name: parameter.dim() <= 1 or is_adapter(name), {"wd_mult": 0.0})
    return overrides


def _belongs_to(learning: Learning, group: LearningGroup) -> Callable[[torch.nn.Parameter, str], bool]:
    return lambda parameter, _name: learning.of[parameter] == group


@dataclass(frozen=True)
class GradientNorms:
    """Norms of a step's gradients before clipping, the same on every rank.

    Attributes:
        total: of all of them.
        by_component: of the components that learn, now or later.
        by_unit: of what is clipped together (`LearningGroup.unit`).
    """

    total: float
    by_component: dict[str, float]
    by_unit: dict[str, float] = field(default_factory=dict)


def _live_groups(optimizer: ChainedOptimizer) -> list[dict[str, Any]]:
    """Parameter groups of the optimizers that have parameters on this rank."""
    return [
        group
        for inner in optimizer.chained_optimizers
        if inner.optimizer is not None
        for group in inner.optimizer.param_groups
        if group["params"]
    ]


def _sum_of_squares(gradient: torch.Tensor) -> torch.Tensor:
    """float64. Short runs are added up in fp32, whose rounding averages out: a float64 copy takes ten times as long."""
    flat = gradient.flatten()
    whole = len(flat) // _RUN * _RUN
    runs = torch.linalg.vector_norm(flat[:whole].view(-1, _RUN), dim=1).double()
    return runs.square().sum() + flat[whole:].double().square().sum()


@torch.no_grad()
def gradient_norms(
    optimizer: ChainedOptimizer, parts: Parts, learning: Learning, components: Sequence[str]
) -> GradientNorms:
    """Norms after `prepare_grads`; each gradient counts once, however many ranks hold it."""
    squares = torch.zeros(len(learning.groups), dtype=torch.float64, device=torch.cuda.current_device())
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
                gradient = _gradient_of(parameter, inner.config.use_precision_aware_optimizer)
                if counts and gradient is not None:
                    squares[int(group["lr_mult"]) - 1] += _sum_of_squares(gradient)
    dist.all_reduce(squares)
    by_component = dict.fromkeys(components, 0.0)
    by_unit: dict[str, float] = {}
    for group, square in zip(learning.groups, squares.tolist(), strict=True):
        by_unit[group.unit] = by_unit.get(group.unit, 0.0) + square
        if group.component in by_component:
            by_component[group.component] += square
    return GradientNorms(float(squares.sum().sqrt()), _roots(by_component), _roots(by_unit))


def _roots(squares: dict[str, float]) -> dict[str, float]:
    return {name: math.sqrt(square) for name, square in squares.items()}


@torch.no_grad()
def clip_and_update(
    optimizer: ChainedOptimizer,
    scheduler: OptimizerParamScheduler,
    learning: Learning,
    norms: GradientNorms,
    step: int,
) -> None:
    """Scale each unit's gradients to its limit, and update the weights that learn in a step (from 0)."""
    decoupled = any(inner.config.use_precision_aware_optimizer for inner in optimizer.chained_optimizers)
    for group in _live_groups(optimizer):
        own = learning.tagged(group["lr_mult"])
        if own.clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                group["params"],
                max_norm=own.clip_grad,
                total_norm=norms.by_unit[own.unit],
                use_decoupled_grad=decoupled,
            )
        if learning.warmup_iters:
            group["lr"] = scheduler.get_lr(group) * learning.rate_factor(own, step)
    with _only_learning(optimizer, learning, step):
        updated = optimizer.step_with_ready_grads()
    assert updated, "the optimizer skipped a step although gradients are finite"


@contextlib.contextmanager
def _only_learning(optimizer: ChainedOptimizer, learning: Learning, step: int) -> Iterator[None]:
    """Keep from Adam the groups that do not learn yet: it would count their steps and decay their weights."""
    held = [inner.optimizer for inner in optimizer.chained_optimizers if inner.optimizer is not None]
    whole = [one.param_groups for one in held]
    for one, groups in zip(held, whole, strict=True):
        one.param_groups = [group for group in groups if learning.tagged(group["lr_mult"]).first_step <= step]
    try:
        yield
    finally:
        for one, groups in zip(held, whole, strict=True):
            one.param_groups = groups


def learning_rates(
    scheduler: OptimizerParamScheduler, learning: Learning, components: Sequence[str], step: int
) -> dict[str, float]:
    """Largest rate that any layer of each component has in a step (from 0); 0: it does not learn yet.

    Also of components that this rank has no parameter of, and without LoRA's B.
    """
    rates = dict.fromkeys(components, 0.0)
    for group in learning.groups:
        if group.component in rates and not group.is_lora_b:
            rate = float(scheduler.get_lr({"max_lr": group.max_lr, "min_lr": group.min_lr}))
            rates[group.component] = max(rates[group.component], rate * learning.rate_factor(group, step))
    return rates
