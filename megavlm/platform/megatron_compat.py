"""The one place that knows how the Megatron-Core versions differ."""

import queue
from importlib import metadata
from pathlib import Path
from typing import Any

from megavlm.errors import use_error

OLDEST = (0, 16, 1)
BELOW = (0, 20, 0)


def version() -> tuple[int, int, int]:
    """Installed megatron-core version as (major, minor, patch)."""
    parts = metadata.version("megatron-core").split("+")[0].split(".")
    digits = ["".join(character for character in part if character.isdigit()) or "0" for part in parts[:3]]
    numbers = [int(part) for part in digits] + [0, 0]
    return numbers[0], numbers[1], numbers[2]


def check_version() -> None:
    """Raise `UseError` unless the installed megatron-core lies in the supported range."""
    found = version()
    if not OLDEST <= found < BELOW:
        raise use_error(
            "megatron-core",
            ".".join(map(str, found)),
            ">=0.16.1,<0.20",
            'pip install "megatron-core>=0.16.1,<0.20"',
        )


# Megatron-Core's global for each group that parts of it fall back to (0.16.1 and 0.19.2), by the field of
# ProcessGroupCollection that it holds.
_GLOBAL_GROUPS = {
    "_TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "_PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "_MODEL_PARALLEL_GROUP": "mp",
    "_EMBEDDING_GROUP": "embd",
    "_POSITION_EMBEDDING_GROUP": "pos_embd",
    "_CONTEXT_PARALLEL_GROUP": "cp",
    "_DATA_PARALLEL_GROUP": "dp",
    "_DATA_PARALLEL_GROUP_WITH_CP": "dp_cp",
    "_TENSOR_AND_CONTEXT_PARALLEL_GROUP": "tp_cp",
    "_TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "tp_dp_cp",
    "_EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "_EXPERT_TENSOR_PARALLEL_GROUP": "expt_tp",
    "_EXPERT_DATA_PARALLEL_GROUP": "expt_dp",
}

# 0.19 can also cut weights over data ranks ("generalized tensor parallelism"), and has these groups once more with the
# ranks that share a weight. Here none do, and they are what `initialize_model_parallel` makes them then: the same.
_GLOBAL_GROUPS_FROM_0_19 = {
    "_DATA_PARALLEL_GROUP_WITH_GTP_REMAT": "dp",
    "_DATA_PARALLEL_GROUP_WITH_CP_WITH_GTP_REMAT": "dp_cp",
    "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP_WITH_GTP_REMAT": "intra_dp_cp",
    "_EXPERT_DATA_PARALLEL_GROUP_WITH_GTP_REMAT": "expt_dp",
    "_INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP_WITH_GTP_REMAT": "intra_expt_dp",
}


def set_parallel_state(groups: Any, num_virtual_stages: int | None) -> None:
    """Tell Megatron-Core's `parallel_state` of groups that it has not made itself.

    Its own `initialize_model_parallel` lays one grid over the whole world; ours has ranks that hold the encoder alone.

    Args:
        groups: a ProcessGroupCollection.
        num_virtual_stages: model chunks of a pipeline rank; None: one.
    """
    from megatron.core import parallel_state

    state = vars(parallel_state)
    names = _GLOBAL_GROUPS | (_GLOBAL_GROUPS_FROM_0_19 if version() >= (0, 19, 0) else {})
    for name, field in names.items():
        assert name in state, f"megatron-core has no parallel_state.{name} any more"
        state[name] = vars(groups)[field]
    assert "_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE" in state
    state["_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE"] = num_virtual_stages
    if state["_GLOBAL_MEMORY_BUFFER"] is None:
        parallel_state._set_global_memory_buffer()


def clear_parallel_state() -> None:
    """Forget the groups."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()


def begin_save(state: dict[str, Any], folder: Path) -> Any:
    """Begin Megatron-Core's save of a sharded state; the files are the same with every version.

    Args:
        state: sharded state of this rank, and what is the same on every rank.
        folder: existing and empty.

    Returns:
        An AsyncRequest of Megatron-Core: its function writes the files (in the thread that calls it), its other
        functions complete the checkpoint.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    _write_in_this_process()
    # From 0.17 on it asks for a writer of another package unless it is told to use its own.
    own_writer = {"async_strategy": "mcore"} if version() >= (0, 17, 0) else {}
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1)
    request = dist_checkpointing.save(state, str(folder), strategy, async_sharded_save=True, **own_writer)
    if version() >= (0, 19, 0):
        _write_common(state, folder)
    return request


def _write_common(state: dict[str, Any], folder: Path) -> None:
    """Write what is not sharded into a file of its own, as before 0.19, which reads it too.

    0.19 writes it among the sharded files, where older versions do not find it.
    """
    import torch
    from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
    from megatron.core.dist_checkpointing.utils import extract_sharded_base

    if torch.distributed.get_rank() == 0:
        _sharded, common = extract_sharded_base(state)
        torch.save(common, folder / COMMON_STATE_FNAME)


def _write_in_this_process() -> None:
    """Have Megatron-Core's checkpoint writer write in the thread that calls it, not in processes or threads of its own.

    Forking a process with threads (gloo's, a data loader's) can hang, and starting a writer takes seconds (0.16.1).
    From 0.17 on it writes in threads, which make an assertion of a full disk. The results come through a server
    process, which takes seconds too and outlives a rank that is killed (every version). Called once for each save: the
    results of one that failed must not be taken for those of the next.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer = filesystem_async.FileSystemWriterAsync
    replaced = "write_preloaded_data_multiproc" if version() < (0, 17, 0) else "write_preloaded_data_multithread"
    for holder, name in ((filesystem_async, "_results_queue"), (writer, replaced), (writer, "write_preloaded_data")):
        assert name in vars(holder), f"megatron-core has no {name} any more"
    vars(filesystem_async)["_results_queue"] = queue.SimpleQueue()
    setattr(writer, replaced, staticmethod(_write_buckets))


def _write_buckets(transforms: Any, use_msc: bool, _rank: int, buckets: Any, results: Any) -> None:
    """In place of what `_write_in_this_process` replaces: bucket after bucket."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    written: dict[int, Any] = {}
    for number, bucket in enumerate(buckets):
        own: queue.SimpleQueue[Any] = queue.SimpleQueue()
        left: queue.Queue[int] = queue.Queue()
        left.put(number)
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, own, left, use_fsync=True)
        _, outcome = own.get()
        if isinstance(outcome, Exception):
            results.put(outcome)
            return
        written[number] = outcome
    results.put(written)
