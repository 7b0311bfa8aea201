"""Whether a recipe fits its ranks (`validate_layout`) and its model (`validate_model`)."""

import math

from megavlm.config.facts import ModelFacts
from megavlm.config.layout import divisors, layers_per_stage
from megavlm.config.learning import check_unfrozen_layers
from megavlm.config.schema import ParallelConfig, Recipe
from megavlm.errors import use_error


def validate_layout(recipe: Recipe, world_size: int) -> int:
    """Check that the ranks and the global batch divide, and return the data parallel size.

    Args:
        recipe: a recipe that `validate_recipe` accepts.
        world_size: processes of the run.

    Raises:
        UseError: they do not divide; the message lists what would.
    """
    parallel, train = recipe.parallel, recipe.train
    own_ranks = _own_ranks(parallel, world_size)
    world_size -= own_ranks
    sizes = {
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "context": parallel.context_parallel_size,
    }
    model_ranks = math.prod(sizes.values())
    product = " x ".join(f"{name} {size}" for name, size in sizes.items())
    if world_size % model_ranks != 0:
        raise use_error(
            "world size",
            f"{world_size + own_ranks} processes",
            f"a multiple of {model_ranks} ({product})" + (f" and {own_ranks} for the encoder" if own_ranks else ""),
            f"start {_multiples(world_size, model_ranks, own_ranks)} processes, or change the parallel sizes",
        )
    data_parallel_size = world_size // model_ranks
    _check_expert_ranks(parallel, data_parallel_size)
    if recipe.data.packing:  # rows are filled by length and cost, as many as it takes
        if train.global_batch_size < data_parallel_size:
            raise use_error(
                "train.global_batch_size",
                train.global_batch_size,
                f"at least {data_parallel_size}, a sample for each data rank",
                "raise it, or start fewer processes",
            )
        return data_parallel_size
    samples = train.micro_batch_size * data_parallel_size
    if train.global_batch_size % samples != 0:
        raise use_error(
            "train.global_batch_size",
            train.global_batch_size,
            f"a multiple of {samples} (micro_batch_size {train.micro_batch_size} x data parallel {data_parallel_size})",
            f"use {_multiples(train.global_batch_size, samples)}, or a world size out of "
            f"{_legal_world_sizes(recipe, model_ranks, own_ranks)}",
        )
    _check_interleaving(recipe, train.global_batch_size // samples)
    return data_parallel_size


def validate_model(recipe: Recipe, facts: ModelFacts) -> None:
    """Check that the model divides by the layout, and that the longest sample fits it.

    Raises:
        UseError: it does not; the message says which sizes would do.
    """
    parallel = recipe.parallel
    _check_tensor_sizes(parallel, facts)
    _check_vision_stages(parallel, facts)
    _check_experts(recipe, facts)
    layers_per_stage(parallel, facts.num_layers)
    check_unfrozen_layers(recipe, facts)
    if recipe.data.max_length > facts.max_positions:
        raise use_error(
            "data.max_length",
            recipe.data.max_length,
            f"at most the model's max_position_embeddings {facts.max_positions}",
            f"set data.max_length={facts.max_positions}",
        )


def _check_expert_ranks(parallel: ParallelConfig, data_parallel_size: int) -> None:
    tensor = parallel.tensor_model_parallel_size
    stage_ranks = tensor * parallel.context_parallel_size * data_parallel_size
    expert_tensor = parallel.expert_tensor_parallel_size or tensor
    needed = parallel.expert_model_parallel_size * expert_tensor
    if stage_ranks % needed != 0:
        raise use_error(
            "parallel.expert_model_parallel_size",
            f"{parallel.expert_model_parallel_size} x expert tensor {expert_tensor} of {stage_ranks} ranks of a "
            "pipeline stage",
            f"a divisor of tensor x context x data parallel ranks ({stage_ranks})",
            "lower it, or set parallel.expert_tensor_parallel_size=1",
        )


def _check_experts(recipe: Recipe, facts: ModelFacts) -> None:
    parallel, modules = recipe.parallel, recipe.parallel.recompute_modules
    expert, selective = parallel.expert_model_parallel_size, parallel.recompute_granularity == "selective"
    if not facts.num_experts:
        for key, value, unused in (
            ("parallel.expert_model_parallel_size", expert, 1),
            ("parallel.expert_tensor_parallel_size", parallel.expert_tensor_parallel_size, 0),
            ("model.moe_aux_loss_coeff", recipe.model.moe_aux_loss_coeff, 0),
        ):
            if value != unused:
                raise use_error(
                    key, value, f"{unused}: this model has no mixture-of-experts layers", f"set {key}={unused}"
                )
        if selective and "moe" in modules:
            raise use_error("parallel.recompute_modules", "moe", "mlp: this model has no experts", "write mlp")
        return
    if facts.num_experts % expert != 0:
        raise use_error(
            "parallel.expert_model_parallel_size",
            expert,
            f"a divisor of the model's {facts.num_experts} experts",
            f"use one of {divisors(facts.num_experts)}",
        )
    expert_tensor = parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size
    if facts.expert_ffn_hidden_size % expert_tensor != 0:
        raise use_error(
            "parallel.expert_tensor_parallel_size",
            expert_tensor,
            f"a divisor of an expert's {facts.expert_ffn_hidden_size} feed-forward channels",
            "set parallel.expert_tensor_parallel_size=1",
        )
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        raise use_error(
            "parallel.sequence_parallel",
            f"false with tensor parallel {parallel.tensor_model_parallel_size} and experts",
            "true: each rank routes tokens of its own",
            "set parallel.sequence_parallel=true",
        )
    if selective and "mlp" in modules:
        raise use_error("parallel.recompute_modules", "mlp", "moe: this model's feed-forwards are experts", "write moe")


def _check_vision_stages(parallel: ParallelConfig, facts: ModelFacts) -> None:
    num_stages = parallel.vision_pipeline_model_parallel_size
    if num_stages > facts.vision_num_layers:
        raise use_error(
            "parallel.vision_pipeline_model_parallel_size",
            num_stages,
            f"at most the vision tower's {facts.vision_num_layers} layers",
            f"set it to {facts.vision_num_layers} or less",
        )


def _check_interleaving(recipe: Recipe, num_microbatches: int) -> None:
    """Megatron's interleaved schedule runs microbatches in groups of the pipeline size."""
    pipeline = recipe.parallel.pipeline_model_parallel_size
    if recipe.parallel.virtual_pipeline_model_parallel_size == 1 or num_microbatches % pipeline == 0:
        return
    batch = recipe.train.global_batch_size
    step = batch // num_microbatches * pipeline
    raise use_error(
        "train.global_batch_size",
        f"{batch}, which is {num_microbatches} microbatches on each data rank",
        f"microbatches in a multiple of pipeline_model_parallel_size {pipeline} (the interleaved schedule)",
        f"use {_multiples(batch, step)}, or parallel.virtual_pipeline_model_parallel_size=1",
    )


def _check_tensor_sizes(parallel: ParallelConfig, facts: ModelFacts) -> None:
    """Heads, feed-forwards and vocabulary divide; key-value heads divide or are repeated."""
    tensor, vision_tensor = parallel.tensor_model_parallel_size, parallel.vision_tensor_model_parallel_size
    key = "parallel.tensor_model_parallel_size"
    legal = [size for size in range(1, 65) if not _tensor_problem(size, facts)]
    if parallel.vision_placement == "own_ranks":
        _check_own_tensor_sizes(vision_tensor or 1, facts)
        vision_tensor = 1
    if vision_tensor != 1:  # the vision tower is split as the language model is
        legal = [size for size in legal if not _vision_tensor_problem(size, facts)]
    fix = f"use one of {', '.join(map(str, legal))}"
    problem = _tensor_problem(tensor, facts)
    if problem:
        raise use_error(key, tensor, problem, fix)
    problem = _vision_tensor_problem(vision_tensor or tensor, facts)
    if problem:
        raise use_error(key, tensor, problem, f"{fix}, or set parallel.vision_tensor_model_parallel_size=1")


def _check_own_tensor_sizes(tensor: int, facts: ModelFacts) -> None:
    problem = _vision_tensor_problem(tensor, facts)
    if problem:
        legal = ", ".join(str(size) for size in range(1, 65) if not _vision_tensor_problem(size, facts))
        raise use_error("parallel.vision_tensor_model_parallel_size", tensor, problem, f"use one of {legal}")


def _tensor_problem(tensor: int, facts: ModelFacts) -> str:
    """Return what a tensor parallel size should have been for the language model; empty when it is fine."""
    for size, what in (
        (facts.num_attention_heads, "attention heads"),
        (facts.ffn_hidden_size, "feed-forward channels"),
        (facts.vocab_size, "vocabulary rows"),
    ):
        if size % tensor != 0:
            return f"a divisor of the model's {size} {what}"
    groups = facts.num_query_groups
    if groups % tensor != 0 and tensor % groups != 0:
        return f"a divisor or a multiple of the model's {groups} key-value heads"
    return ""


def _vision_tensor_problem(tensor: int, facts: ModelFacts) -> str:
    """As `_tensor_problem`, for the vision tower."""
    for size, what in (
        (facts.vision_num_attention_heads, "vision attention heads"),
        (facts.vision_ffn_hidden_size, "vision feed-forward channels"),
    ):
        if size % tensor != 0:
            return f"a divisor of the model's {size} {what}"
    return ""


def _own_ranks(parallel: ParallelConfig, world_size: int) -> int:
    """Ranks of an encoder that has its own; 0 for the other placements."""
    if parallel.vision_placement != "own_ranks":
        return 0
    encoders, tensor = parallel.vision_data_parallel_size, parallel.vision_tensor_model_parallel_size or 1
    if encoders * tensor >= world_size:
        raise use_error(
            "parallel.vision_data_parallel_size",
            f"{encoders} encoders x tensor parallel {tensor} of {world_size} processes",
            "ranks that are left for the language model",
            f"start more than {encoders * tensor} processes, or lower it",
        )
    return encoders * tensor


def _legal_world_sizes(recipe: Recipe, model_ranks: int, own_ranks: int) -> str:
    """World sizes under which the global batch divides."""
    rounds = recipe.train.global_batch_size // recipe.train.micro_batch_size
    return ", ".join(str(own_ranks + model_ranks * size) for size in range(1, rounds + 1) if rounds % size == 0)


def _multiples(number: int, step: int, further: int = 0) -> str:
    """Return the multiples of `step` around `number`, with `further` added."""
    below = number // step * step
    return f"{below + further} or {below + step + further}" if below else str(step + further)
