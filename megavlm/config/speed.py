"""What the knobs of memory and speed may be set to: those whose code is Megatron-Core's, or Transformer Engine's.

What Megatron-Core would assert on, or do wrong without a word, is said here before anything is built. Lines are those
of megatron-core 0.16.1.
"""

from megavlm.config.numerics import compute_dtype
from megavlm.config.schema import Recipe
from megavlm.config.tuning import tuning_plan
from megavlm.errors import use_error


def check_speed(recipe: Recipe) -> None:
    """Check knobs of memory and speed against each other and the rest.

    Raises:
        UseError: the first contradiction found.
    """
    _check_optimizer_offload(recipe)
    if recipe.parallel.tp_comm_overlap:
        _check_tensor_overlap(recipe)


def _check_tensor_overlap(recipe: Recipe) -> None:
    """Transformer Engine's user buffers are made once, for rows of one length on ranks that follow each other."""
    parallel, where = recipe.parallel, "parallel.tp_comm_overlap"
    wanted = {
        f"model.backend {recipe.model.backend}": (recipe.model.backend == "te", "model.backend=te"),
        f"tensor_model_parallel_size {parallel.tensor_model_parallel_size}": (
            parallel.tensor_model_parallel_size > 1,
            "parallel.tensor_model_parallel_size to more than 1",
        ),
        "sequence_parallel false": (parallel.sequence_parallel, "parallel.sequence_parallel=true"),
        "data.pad_to_packing_length false": (recipe.data.pad_to_packing_length, "data.pad_to_packing_length=true"),
        f"vision_placement {parallel.vision_placement}": (
            parallel.vision_placement != "own_ranks",  # tensor ranks would begin anywhere
            "another parallel.vision_placement",
        ),
        "peft": (not tuning_plan(recipe).has_adapters, "parallel.tp_comm_overlap=false: adapters have messages too"),
        f"observe.num_report_samples {recipe.observe.num_report_samples}": (
            recipe.observe.num_report_samples == 0,  # questions are put into a row of another length
            "observe.num_report_samples=0",
        ),
    }
    for got, (is_met, fix) in wanted.items():
        if not is_met:
            raise use_error(
                where,
                f"true with {got}",
                "te, sequence parallelism, and rows of one length (data.pad_to_packing_length)",
                f"set {fix}, or {where}=false" if not fix.startswith(where) else f"set {fix}",
            )


def _check_optimizer_offload(recipe: Recipe) -> None:
    """Megatron-Core's optimizer in CPU memory is the distributed one, over weights in half precision."""
    parallel, where = recipe.parallel, "parallel.optimizer_cpu_offload"
    if not parallel.optimizer_cpu_offload:
        if parallel.overlap_cpu_optimizer_d2h_h2d or parallel.optimizer_offload_fraction != 1.0:
            name = "overlap_cpu_optimizer_d2h_h2d"
            name = name if parallel.overlap_cpu_optimizer_d2h_h2d else "optimizer_offload_fraction"
            raise use_error(
                f"parallel.{name}", f"{vars(parallel)[name]} without optimizer_cpu_offload", "both", f"set {where}=true"
            )
        return
    if not 0 < parallel.optimizer_offload_fraction <= 1:
        raise use_error(
            "parallel.optimizer_offload_fraction",
            parallel.optimizer_offload_fraction,
            "above 0, and at most 1",
            "give the part of the weights that is updated on the CPU, or set optimizer_cpu_offload=false",
        )
    if not parallel.use_distributed_optimizer:  # optimizer_config.py:379
        raise use_error(
            where,
            "true with use_distributed_optimizer false",
            "the distributed optimizer",
            "set parallel.use_distributed_optimizer=true",
        )
    # weights in fp32 are not found when its state is loaded (hybrid_optimizer.py:373); none has tried a loss scale
    if compute_dtype(recipe) != "bf16" or recipe.fp8.fp8_param_gather:
        got = "fp8.fp8_param_gather" if recipe.fp8.fp8_param_gather else f"train.precision {recipe.train.precision}"
        raise use_error(
            where,
            f"true with {got}",
            "weights in bf16, which Megatron-Core's hybrid optimizer has main weights for",
            "set train.precision=bf16 (or fp8 without fp8_param_gather), or optimizer_cpu_offload=false",
        )
    if recipe.optimizer.unfreeze:  # every group is asked for its rate in every step (hybrid_optimizer.py:349)
        raise use_error(
            where,
            f"true with optimizer.unfreeze `{recipe.optimizer.unfreeze}`",
            "all groups from the start",
            "start a run for each stage, or set optimizer_cpu_offload=false",
        )
