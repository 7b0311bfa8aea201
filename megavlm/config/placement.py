"""Whether the encoder's placement and the knobs beside it belong together."""

from megavlm.config.schema import ParallelConfig
from megavlm.errors import use_error

# Knobs that only some placements read, with their value where they are not used.
_READ_BY: dict[str, tuple[object, tuple[str, ...]]] = {
    "vision_pipeline_model_parallel_size": (1, ("stage",)),
    "vision_data_parallel_size": (1, ("own_ranks",)),
    "vision_max_live_microbatches": (0, ("bubble",)),
    "vision_extra_microbatches_in_flight": (0, ("bubble",)),
    "vision_recompute": (False, ("spread", "bubble")),
}


def check_placement(parallel: ParallelConfig) -> None:
    """Check what the recipe alone can tell.

    Raises:
        UseError: a knob of another placement is set, or the pipeline is too short.
    """
    placement, pipeline = parallel.vision_placement, parallel.pipeline_model_parallel_size
    for name, (unused, placements) in _READ_BY.items():
        value = vars(parallel)[name]
        if value != unused and placement not in placements:
            raise use_error(
                f"parallel.{name}",
                f"{value} with vision_placement {placement}",
                f"{unused}, or vision_placement {' or '.join(placements)}",
                f"set parallel.vision_placement={placements[0]} or remove {name}",
            )
    if placement == "stage":
        _check_stages(parallel)
    virtual = parallel.virtual_pipeline_model_parallel_size
    if placement in ("stage", "own_ranks") and virtual > 1:
        raise use_error(
            "parallel.virtual_pipeline_model_parallel_size",
            f"{virtual} with vision_placement {placement}",
            "1: the encoder's ranks run once a microbatch",
            "set it to 1, or choose vision_placement bubble",
        )
    extra = parallel.vision_extra_microbatches_in_flight
    if extra and virtual > 1:
        raise use_error(
            "parallel.vision_extra_microbatches_in_flight",
            f"{extra} with {virtual} model chunks a rank",
            "0: interleaved pipelines have more microbatches in flight already",
            "remove it, or set parallel.virtual_pipeline_model_parallel_size=1",
        )
    # A bubble needs a pipeline to have one; with one rank it would be first_stage under another name.
    if placement == "bubble" and pipeline == 1:
        raise use_error(
            "parallel.vision_placement",
            "bubble with pipeline_model_parallel_size 1, which has no bubble",
            "a pipeline of 2 or more",
            "set parallel.vision_placement=spread or parallel.pipeline_model_parallel_size=2",
        )


def _check_stages(parallel: ParallelConfig) -> None:
    vision, pipeline = parallel.vision_pipeline_model_parallel_size, parallel.pipeline_model_parallel_size
    if vision >= pipeline:
        raise use_error(
            "parallel.vision_pipeline_model_parallel_size",
            f"{vision} of {pipeline} pipeline ranks",
            f"at most {pipeline - 1}, so that a rank is left for the language model"
            if pipeline > 1
            else "a pipeline of 2 or more ranks: one for the encoder, one for the language model",
            f"set parallel.pipeline_model_parallel_size={vision + 1} or more",
        )
