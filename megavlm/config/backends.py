"""What a recipe may ask of `model.backend`."""

from megavlm.config.schema import Recipe
from megavlm.errors import use_error


def check_backend(recipe: Recipe) -> None:
    """Check what a backend can do at all; what depends on the model or a package's version is found when it is built.

    Raises:
        UseError: it cannot do what is asked.
    """
    _check_precision(recipe)
    _check_context_messages(recipe)


def _check_precision(recipe: Recipe) -> None:
    if recipe.model.backend == "flash" and recipe.train.precision == "fp32":
        raise use_error(
            "model.backend",
            "flash with train.precision fp32",
            "bf16",
            "set train.precision=bf16 or model.backend=torch",
        )


def _check_context_messages(recipe: Recipe) -> None:
    """What a backend cannot do; Transformer Engine's own limits are found when it is there (`models/te.py`)."""
    backend, kind = recipe.model.backend, recipe.parallel.cp_comm_type
    known = {"torch": ("all_gather", "p2p"), "flash": ("all_gather",), "te": ("all_gather", "p2p", "a2a")}[backend]
    if recipe.parallel.context_parallel_size > 1 and kind not in known:
        raise use_error(
            "parallel.cp_comm_type",
            f"{kind} with model.backend={backend}",
            " or ".join(known),
            f"set parallel.cp_comm_type={known[0]}" + ("" if backend == "te" else ", or model.backend=te"),
        )
