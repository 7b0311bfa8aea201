"""Putting adapters into a rank's parts of a model, switching them off, and merging them into the weights."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist

from megavlm.config.peft import PeftConfig
from megavlm.config.tuning import ADAPTERS, BOTTLENECKS, COMPONENTS, TuningPlan, parse_components
from megavlm.errors import use_error
from megavlm.models.chunk import LanguageChunk
from megavlm.models.core_attention import PackedAttention, PrefixModule
from megavlm.models.linear import AdaptableLinear, LinearAdapter, weight_of
from megavlm.models.names import Part, component_of, global_name, layer_of
from megavlm.models.weight_map import Entry
from megavlm.peft.bottleneck import Bottleneck, BottleneckAdapter, Tap
from megavlm.peft.cross_modal import CrossModalBottleneck
from megavlm.peft.ia3 import Ia3Adapter, scaled_part
from megavlm.peft.lora import LoraAdapter, initialise, scaling_of
from megavlm.peft.prefix import Prefix
from megavlm.peft.targets import ALL_LINEAR, find_targets, is_meant, linears_of, module_names


def attach(
    parts: Sequence[Part],
    entries: Sequence[Entry],
    plan: TuningPlan,
    peft: PeftConfig,
    seed: int,
    dtype: torch.dtype,
    backend: str = "torch",
) -> None:
    """Put adapters where the plan says so. Every rank of the world calls this, before DDP wraps the parts.

    Args:
        parts: of the model, with their weights.
        entries: weight map of the whole model.
        plan: how each layer learns.
        peft: knobs of the adapters.
        seed: of the run.
        dtype: of the adapters' weights.
        backend: of the parts.

    Raises:
        UseError: a component is to be adapted in which no linear is meant, or experts in a way that cannot be.
    """
    if not plan.has_adapters:
        return
    _check_experts(entries, plan, peft, backend)
    counts = dict.fromkeys(COMPONENTS, 0)
    for target in list(find_targets(parts, entries, plan, peft.target_modules, ("lora", "ia3"))):
        adapter: LoraAdapter | Ia3Adapter
        if target.tuning.method == "lora":
            scaling = scaling_of(target.tuning.rank, target.tuning.alpha, peft.use_rslora)
            adapter = LoraAdapter(target, scaling, peft.lora_dropout, peft.use_dora, dtype)
            initialise(adapter, target, seed)
        else:
            scaled = scaled_part(target) if ALL_LINEAR in peft.target_modules else target
            if scaled is None:
                continue
            adapter = Ia3Adapter(scaled, dtype)
        target.linear.adapter = adapter
        counts[component_of(target.name)] += 1
    for part in parts:
        _attach_bottlenecks(part, plan, seed, dtype, counts)
        _attach_prefixes(part, plan, seed, dtype, counts)
    _check_found(counts, plan, peft)


# Where a block ends: by the end of its last linear's name, those that its first linear may have.
_BLOCKS = {"linear_proj": ("linear_qkv", "linear_query"), "linear_fc2": ("linear_fc1",)}


def _attach_bottlenecks(part: Part, plan: TuningPlan, seed: int, dtype: torch.dtype, counts: dict[str, int]) -> None:
    """Behind or beside attention and MLP of each layer, and connectors; mixtures of experts have none."""
    linears = dict(linears_of(part))
    for name, linear in linears.items():
        tuning = plan.of(component_of(name), layer_of(name))
        block, _, last = name.rpartition(".")
        if tuning.method not in BOTTLENECKS or last not in _BLOCKS or ".experts." in name:
            continue
        tap, num_inputs = None, linear.output_size
        if tuning.method == "parallel_adapter":
            first = next(linears[f"{block}.{one}"] for one in _BLOCKS[last] if f"{block}.{one}" in linears)
            first.adapter = tap = Tap()
            num_inputs = first.input_size
        bottleneck: Bottleneck | CrossModalBottleneck
        if tuning.method == "cross_modal_adapter":
            assert isinstance(part, LanguageChunk), "the recipe's checks let no other part have it"
            bottleneck = CrossModalBottleneck(num_inputs, tuning.size, dtype, part.watch_visual_tokens())
        else:
            bottleneck = Bottleneck(num_inputs, tuning.size, linear.output_size, dtype)
        bottleneck.initialise(name, seed)
        linear.adapter = BottleneckAdapter(linear, bottleneck, tap)
        counts[component_of(name)] += 1


def _attach_prefixes(part: Part, plan: TuningPlan, seed: int, dtype: torch.dtype, counts: dict[str, int]) -> None:
    for local_name, module in list(part.named_modules()):
        if not isinstance(module, PackedAttention):
            continue
        name = global_name(part, f"{local_name}.adapter")
        tuning = plan.of(component_of(name), layer_of(name))
        if tuning.method == "prefix":
            # The module's own config counts a head for each tensor rank where there are fewer heads than ranks.
            num_heads = part.get_submodule(local_name.rpartition(".")[0]).config.num_query_groups
            assert isinstance(num_heads, int)
            module.adapter = Prefix(module, num_heads, tuning.size, dtype)
            module.adapter.initialise(name, seed)
            counts[component_of(name)] += 1


def _check_experts(entries: Sequence[Entry], plan: TuningPlan, peft: PeftConfig, backend: str) -> None:
    for entry in entries:
        method = plan.of(component_of(entry.native), layer_of(entry.native)).method
        if not entry.stacked or method not in ("lora", "ia3"):
            continue
        if not is_meant(module_names(entry)[0], peft.target_modules):
            continue
        if backend == "te":
            raise use_error(
                "peft.target_modules",
                f"{', '.join(peft.target_modules)}, experts among them ({entry.names[0]}), with model.backend te",
                "linears of attention: Transformer Engine computes all experts in one grouped product",
                "set model.backend=flash, or peft.target_modules to q_proj, k_proj, v_proj, o_proj",
            )
        if peft.use_dora and method == "lora":
            raise use_error(
                "peft.use_dora",
                f"true for experts ({entry.names[0]})",
                "LoRA for experts, as in peft",
                "set peft.use_dora=false, or name linears of attention in peft.target_modules",
            )


def _check_found(counts: dict[str, int], plan: TuningPlan, peft: PeftConfig) -> None:
    """A recipe that asks for adapters where no rank found a linear for them asks for what is not there."""
    totals = torch.tensor([counts[name] for name in COMPONENTS], device=torch.cuda.current_device())
    dist.all_reduce(totals)
    found = dict(zip(COMPONENTS, totals.tolist(), strict=True))
    named = {rule.component for rule in parse_components(peft) if rule.tuning.method in ADAPTERS}
    for name in named if any(found.values()) else COMPONENTS:
        if not found[name] and any(rule.component == name and rule.tuning.method in ADAPTERS for rule in plan.rules):
            raise use_error(
                "peft.target_modules",
                f"{', '.join(peft.target_modules)}, which is no linear of the {name} component (or of those layers)",
                "all-linear, or ends of Hugging Face names such as q_proj",
                f"change target_modules, or freeze the component: peft.components={name}: frozen, ...",
            )


def adapted_linears(part: Part) -> Iterator[tuple[str, AdaptableLinear]]:
    """Linears of a part that have an adapter of peft's kinds, by their global names."""
    for name, linear in linears_of(part):
        if isinstance(linear.adapter, LoraAdapter | Ia3Adapter):
            yield name, linear


@contextlib.contextmanager
def adapters_disabled(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Run the model without its adapters while inside: the model that tuning started from, e.g. as a reference.

    Args:
        models: parts of a model, wrapped or not. What other components have learned with all their weights stays.
    """
    kinds = LinearAdapter | PrefixModule
    adapters = [module for model in models for module in model.modules() if isinstance(module, kinds)]
    before = [adapter.enabled for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.enabled = False
        yield
    finally:
        for adapter, enabled in zip(adapters, before, strict=True):
            adapter.enabled = enabled


@contextlib.contextmanager
def lora_merged(parts: Iterable[Part]) -> Iterator[None]:
    """Run the model with its low-rank matrices merged into its weights while inside, as fast as it was without them.

    The weights themselves are kept on the host meanwhile, and are put back bit for bit. Other adapters stay.
    """
    held = list(parts)
    linears = [
        linear for part in held for _, linear in adapted_linears(part) if isinstance(linear.adapter, LoraAdapter)
    ]
    kept = [(linear.store, linear.weight.detach().to("cpu", copy=True)) for linear in linears]
    try:
        with torch.no_grad():
            for linear in linears:
                merged = linear.adapter.merged(weight_of(linear))
                if linear.store is None:
                    linear.weight.copy_(merged)
                else:  # a weight in 4 bits is a matrix meanwhile
                    linear.weight, linear.store = merged.to(linear.weight.dtype), None
        _forget_copies(held)
        with adapters_disabled([linear.adapter for linear in linears]):
            yield
    finally:
        with torch.no_grad():
            for linear, (store, weight) in zip(linears, kept, strict=True):
                if store is None:
                    linear.weight.copy_(weight)
                else:
                    linear.weight, linear.store = weight.to(linear.weight.device), store
        _forget_copies(held)


def _forget_copies(parts: Iterable[Part]) -> None:
    """Weights were changed: layers that keep an FP8 copy of theirs make it anew."""
    for part in parts:
        part.set_is_first_microbatch()
