"""Between Hugging Face directories and native checkpoints, in one process."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from megavlm.checkpoint import native
from megavlm.checkpoint.hf_io import DTYPE_NAMES, HFDirectory, export_weights, load_weights, make_empty
from megavlm.errors import use_error
from megavlm.models.names import Part, named_parameters
from megavlm.parallel.groups import Groups

logger = logging.getLogger(__name__)

TIMEOUT_S = 3600


def load_checkpoint_weights(folder: Path, directory: HFDirectory, models: Sequence[Part], groups: Groups) -> int:
    """Fill the parts of a whole model with a native checkpoint's weights; returns its step.

    Raises:
        UseError: the checkpoint is of another model.
    """
    common = native.read_common(folder)["common"]
    if common["architecture"] != repr(directory.architecture):
        raise use_error(
            str(folder),
            f"a checkpoint of another model (family {common['family']})",
            f"one of {directory.path} (family {directory.family.model_type})",
            "give the Hugging Face directory that the run started from",
        )
    loaded = native.load_sharded(folder, native.model_state(models, groups), TIMEOUT_S)
    native.restore_models(models, loaded)
    return int(common["step"])


def import_checkpoint(directory: HFDirectory, models: Sequence[Part], groups: Groups, out_dir: Path) -> Path:
    """Write a directory's weights as a native checkpoint of step 0, without optimizer state."""
    make_empty(out_dir)
    load_weights(directory, models)
    state = native.model_state(models, groups)
    state["common"] = {
        "step": 0,
        "family": directory.family.model_type,
        "architecture": repr(directory.architecture),
        "weights_only": True,
    }
    return native.save_checkpoint(out_dir, 0, state, {}, TIMEOUT_S, keep_last=0)


def export_checkpoint(
    folder: Path,
    directory: HFDirectory,
    models: Sequence[Part],
    groups: Groups,
    out_dir: Path,
    dtype: str | None,
) -> int:
    """Write a native checkpoint as a Hugging Face directory; returns the checkpoint's step.

    Args:
        folder: the checkpoint's step folder.
        directory: the model it started from: config, tokenizer and processor files are copied from there.
        models: parts that make up a whole model, to load into.
        groups: a world of one.
        out_dir: new or empty.
        dtype: float32, bfloat16, float16, or None: what the directory's config says.
    """
    step = load_checkpoint_weights(folder, directory, models, groups)
    whole: dict[str, torch.Tensor] = {
        name: parameter.data for model in models for name, parameter in named_parameters(model)
    }
    export_weights(directory.entries, whole, directory, out_dir, DTYPE_NAMES[dtype] if dtype else None)
    return step
