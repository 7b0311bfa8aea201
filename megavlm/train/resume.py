"""Saving a run, and going on with it: in the same layout or another one."""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megavlm.checkpoint import native, writing
from megavlm.config.learning import unfrozen_by
from megavlm.config.load import dump_recipe, recipe_from_dict
from megavlm.config.tuning import COMPONENTS, describe_tuning, tuning_plan
from megavlm.errors import use_error
from megavlm.train.freeze import learning_components
from megavlm.train.loss_scale import restore_scalers, scaler_state
from megavlm.train.starting_point import (
    check_model,
    checkpoint_root,
    checkpoint_to_load,
    embedding_of,
    load_imported,
    mask_head_of,
)
from megavlm.train.state import TrainState, is_main_rank

logger = logging.getLogger(__name__)


def _layout(state: TrainState) -> dict[str, Any]:
    parallel = dataclasses.asdict(state.recipe.parallel)
    keys = [key for key in parallel if key.endswith("_parallel_size") or key == "vision_placement"]
    return {key: parallel[key] for key in keys} | {"world_size": dist.get_world_size()}


def _common(state: TrainState) -> dict[str, Any]:
    """What is the same on every rank and not sharded."""
    tokenizer = state.train_set.encoder.tokenizer
    return {
        "step": state.step,
        "consumed_samples": state.plan.num_consumed(state.step),
        "seed": state.recipe.train.seed,
        "mixture": _mixture(state),
        "group_by": state.recipe.data.group_by,
        "rows": state.train_set.index.digest,
        "family": state.directory.family.model_type,
        "architecture": repr(state.directory.architecture),
        "text_changes": state.directory.text_changes,
        "has_score_head": state.directory.architecture.language.has_score_head,
        "embedding": embedding_of(state),
        "mask_head": mask_head_of(state.directory),
        "stage": state.recipe.train.stage,
        "starting_point": state.starting_point,
        "early_stopping": state.early_stopping.state(),
        "stage_memory": {} if state.stage.memory is None else state.stage.memory.state(),
        "use_distributed_optimizer": state.recipe.parallel.use_distributed_optimizer,
        "frozen": _frozen(state),
        # with adapters, what does not learn is not in the checkpoint, but in this directory
        "tuning": describe_tuning(state.recipe),
        "base": str(state.directory.path.absolute()),
        "base_digest": state.base_digest,
        "layout": _layout(state),
        "scheduler": state.scheduler.state_dict(),
        "num_skipped": state.num_skipped,
        "num_updates": dict(state.num_updates),
        "unfrozen": unfrozen_by(state.recipe, state.total_steps, state.step),
        "loss_scaler": scaler_state(state.optimizer),
        "fp8": {} if state.parts.fp8 is None else state.parts.fp8.state(),
        "chat_template": tokenizer.chosen_template,
        "eos_token_ids": list(tokenizer.eos_token_ids),
    }


def _frozen(state: TrainState) -> list[str]:
    return sorted(set(COMPONENTS) - set(learning_components(tuning_plan(state.recipe))))


def _learned_only(state: TrainState) -> bool:
    return tuning_plan(state.recipe).has_adapters


def _model_state(state: TrainState) -> dict[str, Any]:
    return native.model_state(state.models, state.groups, _learned_only(state))


def _mixture(state: TrainState) -> str:
    return "" if state.plan.mixture is None else state.plan.mixture.description


def save(state: TrainState) -> Path:
    """Write a checkpoint of the run as it stands, and wait for it."""
    return begin_save(state, copy=False).finish()


def begin_save(state: TrainState, copy: bool) -> writing.PendingSave:
    """Begin to write a checkpoint; `copy`: of the run as it stands now, while it goes on."""
    sharded = _model_state(state)
    if state.num_updates:
        native.allocate_moments(state.optimizer)
    sharded["optimizer"] = native.optimizer_state(state.optimizer, sharded, state.parts.learns, is_loading=False)
    sharded["random_state"] = native.random_state(state.groups)
    sharded["common"] = _common(state)
    knobs = state.recipe.checkpoint
    texts = {"recipe.yaml": dump_recipe(state.recipe)}
    if state.evaluation is not None and state.evaluation[0] == state.step:
        texts[writing.EVALUATION] = json.dumps({"loss": state.evaluation[1]}) + "\n"
    live = _live_storages(state) if copy else frozenset()
    keep = writing.Keep(knobs.keep_last, knobs.keep_every_steps, knobs.keep_best)
    return writing.begin_save(checkpoint_root(state), state.step, sharded, texts, knobs.save_timeout_s, keep, live)


def _live_storages(state: TrainState) -> frozenset[int]:
    """Addresses of the storages that weights and optimizer state lie in."""
    tensors: list[torch.Tensor] = [parameter.data for model in state.models for parameter in model.parameters()]
    for inner in state.optimizer.chained_optimizers:
        if inner.optimizer is None:
            continue
        tensors += [parameter.data for group in inner.optimizer.param_groups for parameter in group["params"]]
        values = [value for entry in inner.optimizer.state.values() for value in entry.values()]
        tensors += [value for value in values if isinstance(value, torch.Tensor)]
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors)


def resume(state: TrainState) -> Path | None:
    """Go on from a checkpoint, if the recipe says so and there is one; returns its folder.

    Imported weights (`megavlm convert import`) are taken as the start of a new run: None is returned.

    Raises:
        UseError: the checkpoint belongs to another model, or its optimizer state has another form.
    """
    folder = checkpoint_to_load(state)
    if folder is None:
        return None
    common = native.read_common(folder)["common"]
    check_model(state, common, folder)
    if common.get("weights_only"):
        load_imported(state, folder)
        return None
    _check_run(state, common, folder)
    if common.get("rows", state.train_set.index.digest) != state.train_set.index.digest and is_main_rank():
        # May be meant (rows were added, another template): the order goes on by number, in the rows as they are now.
        logger.warning("the training rows, or what they become, are not those that %s was trained on", folder)
    # checkpoints from before there was fp16 have skipped nothing
    state.step, state.num_skipped = common["step"], common.get("num_skipped", 0)
    # those from before anything could be unfrozen later have one number for all
    done = state.step - state.num_skipped
    state.num_updates = common.get("num_updates", {0: done} if done else {})
    state.early_stopping.restore(common.get("early_stopping", {}))
    if state.stage.memory is not None:
        state.stage.memory.restore(common.get("stage_memory", {}), folder)
    sharded = _model_state(state)
    if state.num_updates:  # before the first, an optimizer has nothing to save, and weights are what they were
        sharded["optimizer"] = native.optimizer_state(state.optimizer, sharded, state.parts.learns, is_loading=True)
    same_layout = common["layout"] == _layout(state)
    if same_layout:
        sharded["random_state"] = native.random_state(state.groups)
    loaded = native.load_sharded(folder, sharded, state.recipe.checkpoint.save_timeout_s)
    weights = _model_state(state)
    native.restore_optimizer(state.optimizer, weights, loaded.get("optimizer", {}), _updates_of(state))
    native.restore_models(state.models, loaded, _learned_only(state))
    if not state.num_updates:
        state.optimizer.reload_model_params()
    state.parts.weights_changed()  # the reference may have been computed before
    restore_scalers(state.optimizer, common.get("loss_scaler", {}))
    if state.parts.fp8 is not None:
        state.parts.fp8.restore(common.get("fp8", {}))
    if same_layout:
        native.restore_random_state(loaded)
    else:
        logger.info("resumed into another layout: random state (dropout) starts anew")
    state.scheduler.num_steps = 0
    state.scheduler.step(increment=state.step)
    return folder


def _listed(unfrozen: list[list[str | int]]) -> str:
    return ", ".join(f"{what} from step {step} on" for step, what in unfrozen) or "nothing"


def _updates_of(state: TrainState) -> Callable[[Mapping[str, Any]], int]:
    """Adam's steps of a parameter group."""
    return lambda group: state.num_updates.get(state.learning.tagged(group["lr_mult"]).first_step, 0)


def _check_run(state: TrainState, common: dict[str, Any], folder: Path) -> None:
    distributed = state.recipe.parallel.use_distributed_optimizer
    if common["use_distributed_optimizer"] != distributed:
        raise use_error(
            "parallel.use_distributed_optimizer",
            str(distributed).lower(),
            f"{str(common['use_distributed_optimizer']).lower()}, as {folder} was written",
            "keep it when resuming",
        )
    stage = state.recipe.train.stage
    if common.get("stage", stage) != stage:  # without one in checkpoints from before there were several
        raise use_error(
            "train.stage",
            stage,
            f"{common['stage']}, as {folder} was written",
            "export the checkpoint with `megavlm convert` and start a new run from it",
        )
    frozen = _frozen(state)
    if common["frozen"] != frozen:
        raise use_error(
            "optimizer.freeze_*",
            f"frozen {frozen or 'nothing'}",
            f"{common['frozen'] or 'nothing'}, as {folder} was written",
            "export the checkpoint with `megavlm convert` and start a new run from it",
        )
    _check_tuning(state, common, folder)
    ours, theirs = unfrozen_by(state.recipe, state.total_steps, common["step"]), common.get("unfrozen", [])
    if ours != theirs:
        raise use_error(
            "optimizer.unfreeze",
            f"{_listed(ours)} before step {common['step']}",
            f"{_listed(theirs)}, as {folder} was written",
            "keep what has been unfrozen; only later points may change",
        )
    expected = state.plan.num_consumed(common["step"])
    if common["consumed_samples"] != expected:
        raise use_error(
            "train.global_batch_size",
            f"{state.recipe.train.global_batch_size}, which puts step {common['step']} at sample {expected}",
            f"the size that {folder} was written with: {common['consumed_samples']} samples by then",
            "keep it: the position in the data comes from it",
        )
    if common["seed"] != state.recipe.train.seed:
        raise use_error(
            "train.seed",
            state.recipe.train.seed,
            f"{common['seed']}, as {folder} was written",
            "keep the seed: the order of the data comes from it",
        )
    if common.get("mixture", "") != _mixture(state):  # without one in checkpoints from before there were mixtures
        raise use_error(
            "data.mixture",
            "another mixture or curriculum (or other rows in it)",
            f"what {folder} was written with",
            "keep it: the position in the data comes from it; to change it, start a new run from exported weights",
        )
    if common.get("group_by", "") != state.recipe.data.group_by:  # without one in older checkpoints
        raise use_error(
            "data.group_by",
            repr(state.recipe.data.group_by),
            f"{common.get('group_by', '')!r}, as {folder} was written",
            "keep it: the position in the data comes from it",
        )


# Knobs of adapters that may change between a checkpoint and what goes on from it.
_MAY_CHANGE = ("lora_dropout", "lorap_lr_ratio", "adapters")


def _check_tuning(state: TrainState, common: dict[str, Any], folder: Path) -> None:
    """The same weights learn; without adapters in checkpoints from before there were any."""

    def fixed(tuning: dict[str, Any]) -> dict[str, Any]:
        if not tuning:
            return {}
        peft = dataclasses.asdict(recipe_from_dict(tuning).peft)
        return {name: value for name, value in peft.items() if name not in _MAY_CHANGE}

    if common.get("tuning") and common["base_digest"] != state.base_digest:
        raise use_error(
            "model.hf_dir",
            f"{state.directory.path}, with other weights than {folder} was trained beside",
            f"those of {common['base']}",
            "keep model.hf_dir: frozen weights come from there",
        )
    ours, theirs = fixed(describe_tuning(state.recipe)), fixed(common.get("tuning", {}))
    if ours != theirs:
        different = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
        raise use_error(
            f"peft.{different[0]}",
            ours.get(different[0], "no adapters"),
            f"{theirs.get(different[0], 'no adapters')}, as {folder} was written",
            "keep what is tuned when resuming; to change it, merge with `megavlm convert export` and start a new run",
        )
