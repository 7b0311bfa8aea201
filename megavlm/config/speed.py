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
    parallel, data, observe = recipe.parallel, recipe.data, recipe.observe
    where = "parallel.tp_comm_overlap"
    two_types = recipe.train.precision == "fp8" and recipe.fp8.first_last_layers_bf16
    # (what is wrong, what was got, what is expected, what mends it)
    for is_wrong, got, expected, fix in (
        (
            recipe.model.backend != "te",
            f"model.backend {recipe.model.backend}",
            "te, whose buffers these are",
            "model.backend=te",
        ),
        (
            parallel.tensor_model_parallel_size == 1,
            "tensor_model_parallel_size 1",
            "several tensor ranks",
            "parallel.tensor_model_parallel_size=2",
        ),
        (
            not parallel.sequence_parallel,
            "sequence_parallel false",
            "sequence parallelism, whose messages travel so",
            "parallel.sequence_parallel=true",
        ),
        (
            not data.pad_to_packing_length,
            "data.pad_to_packing_length false",
            "rows of one length",
            "data.pad_to_packing_length=true",
        ),
        (
            parallel.vision_placement == "own_ranks",
            "vision_placement own_ranks",
            "tensor ranks that begin at multiples of their number",
            "parallel.vision_placement=stage",
        ),
        (two_types, "fp8.first_last_layers_bf16", "buffers of one type", "fp8.first_last_layers_bf16=false"),
        (tuning_plan(recipe).has_adapters, "peft", "no adapters, which have messages of their own", f"{where}=false"),
        (
            observe.report and bool(data.eval) and observe.num_report_samples > 0,
            f"observe.num_report_samples {observe.num_report_samples}",
            "0: questions are put into rows of other lengths",
            "observe.num_report_samples=0",
        ),
    ):
        if is_wrong:
            raise use_error(where, f"true with {got}", expected, f"set {fix}")


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
