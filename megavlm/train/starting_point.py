"""The weights that a run starts from: those of the Hugging Face directory, or imported ones in a native checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any

import torch.distributed as dist
from blake3 import blake3

from megavlm.checkpoint import native
from megavlm.checkpoint.adapters import WEIGHTS, weights_digest
from megavlm.checkpoint.hf_io import HFDirectory
from megavlm.checkpoint.manifest import MANIFEST, entry_of
from megavlm.config.tuning import tuning_plan
from megavlm.errors import use_error
from megavlm.train.state import TrainState, is_main_rank, run_path

_LEAVE_THE_MODEL = ("lora_dropout", "lorap_lr_ratio")
"""Knobs of adapters that the model which training starts from does not depend on."""


def checkpoint_root(state: TrainState) -> Path:
    """Where the run's checkpoints are."""
    return run_path(state.recipe) / "checkpoints"


def checkpoint_to_load(state: TrainState) -> Path | None:
    """The checkpoint that a run begins with: its own newest, or else that of checkpoint.load_dir; None: none.

    Raises:
        UseError: load_dir holds none.
    """
    knobs = state.recipe.checkpoint
    folder = native.find_checkpoint(checkpoint_root(state), required=False) if knobs.resume else None
    if folder is None and knobs.load_dir:
        folder = native.find_checkpoint(Path(knobs.load_dir), required=True)
    return folder


def imported_weights(state: TrainState) -> Path | None:
    """The folder of weights that take the place of the directory's when the run begins; None: they are the directory's.

    Raises:
        UseError: they belong to another model.
    """
    own = native.find_checkpoint(checkpoint_root(state), required=False) if state.recipe.checkpoint.resume else None
    load_dir = state.recipe.checkpoint.load_dir
    given = native.find_checkpoint(Path(load_dir), required=False) if load_dir else None
    for folder in (own, given):
        if folder is None:
            continue
        common = native.read_common(folder)["common"]
        if common.get("weights_only"):
            check_model(state, common, folder)
            return folder
    return None


def load_imported(state: TrainState, folder: Path) -> None:
    """Fill the run's parts, and the optimizer's copies of them, with imported weights.

    Raises:
        UseError: adapters are to stand beside them.
    """
    if tuning_plan(state.recipe).has_adapters:
        raise use_error(
            "checkpoint.load_dir",
            f"{folder}, weights without adapters, with peft",
            "adapters beside the weights of model.hf_dir, so that they can be put together again",
            "set model.hf_dir to what was imported, and remove load_dir",
        )
    sharded = native.model_state(state.models, state.groups)
    loaded = native.load_sharded(folder, sharded, state.recipe.checkpoint.save_timeout_s)
    native.restore_models(state.models, loaded)
    state.optimizer.reload_model_params()
    state.parts.weights_changed()


def starting_point(state: TrainState) -> str:
    """Tells models apart that training starts from, whatever folder they lie in: a digest, the same on every rank."""
    said = [_digest(state) if is_main_rank() else ""]
    dist.broadcast_object_list(said)
    return said[0]


def _digest(state: TrainState) -> str:
    recipe = state.recipe
    peft = {name: value for name, value in dataclasses.asdict(recipe.peft).items() if name not in _LEAVE_THE_MODEL}
    adapters = Path(peft.pop("adapters"))
    folder = imported_weights(state)
    facts = (
        weights_digest(state.directory),
        state.directory.text_changes,
        "" if folder is None else entry_of(folder / MANIFEST),
        peft,
        # what adapters that do not begin at 0 are drawn from
        recipe.train.seed if tuning_plan(recipe).has_adapters else 0,
        entry_of(adapters / WEIGHTS) if recipe.peft.adapters else "",
    )
    return blake3(repr(facts).encode()).hexdigest()[:32]


def embedding_of(state: TrainState) -> dict[str, Any]:
    """Of an embedding model, what its reader has to know."""
    knobs = state.recipe.contrastive
    if not state.directory.architecture.language.embedding_dim:
        return {}
    facts = {"size": knobs.embedding_dim, "image_prompt": knobs.image_prompt, "text_prompt": knobs.text_prompt}
    matches = state.directory.architecture.language.has_match_head
    return facts | ({"match_prompt": state.recipe.matching.match_prompt} if matches else {})


def mask_head_of(directory: HFDirectory) -> dict[str, Any]:
    """What a head for masks is; empty: there is none."""
    head = directory.architecture.language.mask_head
    return {} if head is None else dataclasses.asdict(head)


def check_model(state: TrainState, common: dict[str, Any], folder: Path) -> None:
    """Check that a checkpoint is one of the run's model.

    Raises:
        UseError: it is not.
    """
    directory, stretched = state.directory, common.get("text_changes", {})
    if common.get("weights_only"):  # a new run may give them another context
        directory = directory.with_text_changes(stretched)
    elif stretched != directory.text_changes:
        own = "what the model came with"
        raise use_error(
            "model.rope_scaling (or rope_theta, max_position_embeddings)",
            directory.text_changes or own,
            f"{stretched or own}, as {folder} was written",
            "keep it when resuming; to change it, start a new run from what `megavlm convert export` writes",
        )
    ours = repr(directory.architecture)
    head = native.head_of(common)
    if head != directory.architecture.language.head:
        raise use_error(
            str(folder),
            f"a checkpoint that ends in {head}",
            f"one that train.stage={state.recipe.train.stage} can go on from",
            "export it with `megavlm convert`, and set model.hf_dir to that",
        )
    embedding = embedding_of(state)
    if common.get("embedding", {}) != embedding:
        changed = next(name for name in embedding if common["embedding"][name] != embedding[name])
        section, knob = "contrastive", {"size": "embedding_dim"}.get(changed, changed)
        if knob == "match_prompt":
            section = "matching"
        raise use_error(
            f"{section}.{knob}",
            embedding[changed],
            f"{common['embedding'][changed]!r}, as {folder} was written",
            "keep it when resuming",
        )
    stored, wanted = common.get("mask_head", {}), mask_head_of(directory)
    if not common.get("weights_only") and stored != wanted:
        raise use_error(
            "sft.mask_loss_coeff (or mask_head_dim)",
            f"a run with {wanted or 'no head for masks'}",
            f"{stored or 'none'}, as {folder} was written",
            "keep it when resuming; to change it, start a new run from what `megavlm convert export` writes",
        )
    if common["architecture"] != ours:
        what = common["family"] if common["family"] != state.directory.family.model_type else "other sizes"
        raise use_error(
            str(folder),
            f"a checkpoint of another model ({what})",
            f"one of {state.recipe.model.hf_dir} ({state.directory.family.model_type})",
            "set model.hf_dir to the model of the checkpoint, or choose another run name",
        )
