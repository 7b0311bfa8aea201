"""A search's result in words: the best layouts, their memory by part, and why the others lost."""

from typing import Any

import yaml

from megavlm.config.schema import ParallelConfig, Recipe
from megavlm.planner.hardware import Hardware
from megavlm.planner.plans import Plan, describe, recipe_of
from megavlm.planner.search import Found

_PARTS = ("weights", "gradients", "optimizer", "encoder", "language", "logits", "buffers")


def page(found: Found, hardware: Hardware, num_gpus: int) -> str:
    """What `megavlm plan` prints.

    Args:
        found: the search's result.
        hardware: that was planned for.
        num_gpus: of the job.
    """
    memory, peak = f"{hardware.memory_bytes / 1e9:.0f} GB", f"{hardware.peak_flops_per_s / 1e12:.0f} TFLOPS"
    lines = [
        f"{num_gpus} x {hardware.name}: {memory} each, {hardware.usable_memory:.0%} of it may be filled; "
        f"{peak}, {hardware.compute_efficiency:.0%} of it reckoned with",
        f"figures: {hardware.source}",
        "Times follow from this cost model alone. Nothing here was measured on a GPU.",
        "",
    ]
    for number, plan in enumerate(found.plans, 1):
        lines += _plan_lines(number, plan)
    lines += ["", *_lost_lines(found)]
    return "\n".join(lines)


def _plan_lines(number: int, plan: Plan) -> list[str]:
    memory = plan.memory
    parts = ", ".join(f"{name} {vars(memory)[name] / 1e9:.1f}" for name in _PARTS)
    end = plan.end
    layers = "+".join(map(str, plan.counts))
    host = f"; {memory.host / 1e9:.1f} GB in CPU memory, whose copies take no time here" if memory.host else ""
    return [
        f"{number}. {describe(plan.layout)}",
        f"   {plan.step_s:.3f} s a step, MFU {plan.mfu:.1%}, bubble {plan.bubble:.1%}, "
        f"{plan.num_microbatches} microbatches, layers {layers}",
        f"   behind the pipeline: language model's gradients and weights {end.language_sync_s:.3f} s, encoder's "
        f"{end.encoder_sync_s:.3f} s, optimizer {end.optimizer_s:.3f} s",
        f"   memory of the fullest rank {memory.total / 1e9:.1f} GB: {parts} (encoder, language: activations){host}",
    ]


def _lost_lines(found: Found) -> list[str]:
    lines = [
        f"{found.num_layouts} layouts divide; {found.num_played} were simulated, the others cannot be quicker by the "
        f"sum of their work; {found.num_too_large} of those looked at need more memory."
    ]
    best = found.plans[0].step_s
    for placement, bound_s in sorted(found.bounds_s.items(), key=lambda item: item[1]):
        listed = [number for number, plan in enumerate(found.plans, 1) if plan.layout.placement == placement]
        if listed:
            lines.append(f"  {placement}: number {listed[0]}")
        else:
            factor = bound_s / best
            why = (
                f"at least {factor:.2f} x the best"
                if factor >= 1
                else "quicker on paper, but too large or with bubbles"
            )
            lines.append(f"  {placement}: {why}")
    lines += [f"  not a layout: {reason} ({count})" for reason, count in found.why_not.most_common()]
    return lines


def block(recipe: Recipe, plan: Plan) -> str:
    """The parts of a recipe that make it run under a plan, as YAML: knobs that differ from their defaults."""
    planned = recipe_of(recipe, plan.layout, plan.counts)
    defaults = vars(ParallelConfig())
    parallel: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(planned.parallel).items()
        if value != defaults[name]
    }
    tree: dict[str, Any] = {"parallel": parallel}
    if plan.layout.samples:
        tree["train"] = {"micro_batch_size": plan.layout.samples}
    else:
        tree["data"] = {"packing": True, "packing_length": plan.layout.packing_length}
    return str(yaml.safe_dump(tree, sort_keys=False))
