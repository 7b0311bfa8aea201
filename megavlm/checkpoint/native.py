"""The state of a run in native checkpoints: sharded, and independent of the layout.

Megatron-Core's `torch_dist` files hold weights, optimizer, schedule and random state; layers by their global number.
`writing.py` puts them on the disk.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import LocalNonpersistentObject, ShardedObject
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megavlm.checkpoint import optimizer_shards
from megavlm.checkpoint.manifest import MANIFEST
from megavlm.checkpoint.watchdog import time_limit
from megavlm.checkpoint.writing import complete_checkpoints, last_line
from megavlm.errors import RunError, use_error
from megavlm.models.architecture import Head
from megavlm.models.encoder import VisionEncoder
from megavlm.models.names import Part
from megavlm.parallel.groups import Groups

logger = logging.getLogger(__name__)


def named_optimizers(optimizer: ChainedOptimizer) -> dict[str, MegatronOptimizer]:
    """The chained optimizers by name; one for experts only on ranks that have experts."""
    inner = optimizer.chained_optimizers
    names = ("language", "encoder") if len(inner) == 2 else ("language", "experts", "encoder")
    return dict(zip(names, inner, strict=True))


def model_state(models: Iterable[Part], groups: Groups, learned_only: bool = False) -> dict[str, Any]:
    """Sharded weights of this rank's parts, by names that do not depend on the layout.

    Args:
        models: the parts.
        groups: process groups.
        learned_only: only weights that learn: the rest stands in the directory that adapters belong to.
    """
    state: dict[str, Any] = {}
    number = 0
    for model in models:
        is_encoder = isinstance(model, VisionEncoder)
        copies = groups.vision.dp_cp if is_encoder else groups.data_context
        metadata = {"non_homogeneous_layers": True, "dp_cp_group": copies, "singleton_local_shards": False}
        name = "encoder" if is_encoder else f"language{number}"
        number += not is_encoder
        whole = model.sharded_state_dict(prefix="", metadata=metadata)
        kept = {key: one for key, one in whole.items() if not _is_extra(key)}
        state[name] = {key: one for key, one in kept.items() if not learned_only or one.data.requires_grad}
    return state


def _is_extra(key: str) -> bool:
    """Whether this is a module's extra state: nothing in Megatron-Core's linears, a pickle in Transformer Engine's.

    It is neither written nor read: checkpoints hold the same whatever the backend, and nothing of them is unpickled.
    """
    return key.rpartition(".")[2].startswith("_extra_state")


def optimizer_state(
    optimizer: ChainedOptimizer, model: Mapping[str, Any], learns: Mapping[str, bool], is_loading: bool
) -> dict[str, Any]:
    """Sharded optimizer state, in a form that any layout can load.

    Only what is sharded. Megatron-Core would take the rest (parameter groups, their number of steps) from rank 0, which
    may hold the encoder alone; both follow from the recipe and the number of the step (`restore_optimizer`).

    Args:
        optimizer: chained, see `named_optimizers`.
        model: sharded weights (`model_state`).
        learns: by the optimizer's name, whether this rank holds weights of its that learn.
        is_loading: whether the state is to be filled.
    """
    state: dict[str, Any] = {}
    for name, inner in named_optimizers(optimizer).items():
        if not learns[name]:
            continue
        if isinstance(inner, DistributedOptimizer):
            if is_loading:
                optimizer_shards.prepare_to_load(inner)
            elif isinstance(inner.optimizer, HybridDeviceOptimizer):
                optimizer_shards.allocate_offloaded(inner.optimizer)
            state[name] = optimizer_shards.sharded_state(inner, model)
        else:
            state[name], _local = extract_sharded_base(_plain_state(inner, model, is_loading))
    return state


def _plain_state(inner: MegatronOptimizer, model: Mapping[str, Any], is_loading: bool) -> dict[str, Any]:
    whole: dict[str, Any] = inner.sharded_state_dict(dict(model), is_loading=is_loading)
    return whole


@torch.no_grad()
def restore_optimizer(
    optimizer: ChainedOptimizer,
    model: Mapping[str, Any],
    loaded: Mapping[str, Any],
    num_updates: Callable[[Mapping[str, Any]], int],
) -> None:
    """Put a loaded state into the optimizers; their knobs stay those of the recipe.

    Args:
        optimizer: as it is built.
        model: sharded weights (`model_state`) that `loaded` was asked for with.
        loaded: what `load_sharded` made of `optimizer_state`.
        num_updates: that it had done of a parameter group.
    """
    for name, inner in named_optimizers(optimizer).items():
        if name not in loaded:
            continue
        if isinstance(inner, DistributedOptimizer):  # was loaded in its place
            state = inner.state_dict()
        else:
            _sharded, local = extract_sharded_base(_plain_state(inner, model, is_loading=True))
            state = merge(dict_list_map_inplace(_unwrapped, local), loaded[name])
        _set_steps(state, num_updates)
        inner.load_state_dict(state)
        if isinstance(inner.optimizer, HybridDeviceOptimizer):
            optimizer_shards.let_steps_go_on(inner.optimizer)


def _unwrapped(value: Any) -> Any:
    return value.unwrap() if isinstance(value, LocalNonpersistentObject) else value


def allocate_moments(optimizer: ChainedOptimizer) -> None:
    """Give Adam moments of 0, which it would begin with, where it has none: checkpoints hold those of all weights."""
    for inner in optimizer.chained_optimizers:
        if isinstance(inner.optimizer, HybridDeviceOptimizer):
            optimizer_shards.allocate_offloaded(inner.optimizer)
        elif inner.optimizer is not None:
            inner.init_state_fn(inner.optimizer, inner.config)


def _set_steps(state: dict[str, Any], num_updates: Callable[[Mapping[str, Any]], int]) -> None:
    """Adam's number of updates, which stands in each parameter group (or once beside the parameters' state)."""
    inner = state.get("optimizer", state)
    for group in inner["param_groups"]:
        group["step"] = num_updates(group)
    if "common_step" in inner.get("state", {}):
        inner["state"]["common_step"] = max(group["step"] for group in inner["param_groups"])


def random_state(groups: Groups) -> ShardedObject:
    """This rank's random state; loadable in the same layout only."""
    from megatron.core import tensor_parallel

    state = {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    shape = (dist.get_world_size(),)
    return ShardedObject("random_state", [state], shape, (dist.get_rank(),), replica_id=0)


def is_intact(folder: Path) -> bool:
    """Whether every file of the manifest is there with its size (hashes are for `verify`, they cost a full read)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError:
        return False
    return bool(manifest) and all(
        (folder / name).is_file() and (folder / name).stat().st_size == entry["bytes"]
        for name, entry in manifest.items()
    )


def find_checkpoint(path: Path, required: bool) -> Path | None:
    """The newest intact checkpoint: `path` itself when it is a step folder, else the newest inside it.

    Raises:
        UseError: none is there although one was asked for by name.
    """
    candidates = [path] if (path / MANIFEST).is_file() else complete_checkpoints(path)
    for folder in reversed(candidates):
        if is_intact(folder):
            return folder
        logger.warning("%s is damaged (a file is missing or has another size); trying the one before", folder)
    if required:
        raise use_error(str(path), "no complete checkpoint", "a folder with step_N/manifest.json", "check the path")
    return None


def read_common(folder: Path) -> dict[str, Any]:
    """What is not sharded: step, layout, family, schedule."""
    common: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(folder))
    return common


def head_of(common: Mapping[str, Any]) -> Head:
    """What the model of a checkpoint ends in (words in checkpoints from before there was anything else)."""
    if common.get("has_score_head", False):
        return "scores"
    embedding = common.get("embedding")
    if not embedding:
        return "words"
    return "matches" if "match_prompt" in embedding else "embeddings"


def load_sharded(folder: Path, state: dict[str, Any], timeout_s: int) -> dict[str, Any]:
    """Fill a sharded state (made for the present layout) from a checkpoint.

    Raises:
        RunError: files are unreadable, or do not hold what is asked for.
    """
    try:
        with time_limit(timeout_s, f"loading {folder}"):
            loaded: dict[str, Any] = dist_checkpointing.load(state, str(folder), TorchDistLoadShardedStrategy())
    except (OSError, RuntimeError, KeyError, CheckpointingException, CheckpointException) as error:
        raise RunError(f"cannot load {folder}: {last_line(error)}") from error
    return loaded


def restore_models(models: Iterable[Part], loaded: Mapping[str, Any], learned_only: bool = False) -> None:
    """Put loaded weights into this rank's parts; `learned_only` as they were asked for (`model_state`)."""
    number = 0
    for model in models:
        is_encoder = isinstance(model, VisionEncoder)
        weights = loaded["encoder" if is_encoder else f"language{number}"]
        missing, unexpected = model.load_state_dict(weights, strict=False)
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        lost = learning & set(missing) if learned_only else {name for name in missing if not _is_extra(name)}
        assert not lost and not unexpected, (lost, unexpected)
        number += not is_encoder


def restore_random_state(loaded: Mapping[str, Any]) -> None:
    """Go on with the saved random state of this rank."""
    from megatron.core import tensor_parallel

    state = loaded["random_state"][0]
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
