"""Process groups of a run: Megatron-Core's for the language model, and those of the vision encoder.

Groups are handed to every module as arguments. `parallel_state` is initialised as well, because parts of
Megatron-Core 0.16 still fall back to it.
"""

import datetime
import os
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megavlm.config.schema import ParallelConfig


@dataclass(frozen=True)
class Groups:
    """Everything a rank belongs to.

    `language` and `vision` are what Megatron-Core modules take as `pg_collection`. `self_only` holds this rank alone:
    the encoder's pipeline and context group while it sits whole on the first stage.
    """

    language: ProcessGroupCollection
    vision: ProcessGroupCollection
    self_only: dist.ProcessGroup

    @property
    def tensor(self) -> dist.ProcessGroup:
        """Tensor-parallel group of the language model."""
        return self.language.tp

    @property
    def context(self) -> dist.ProcessGroup:
        """Context-parallel group of the language model."""
        return self.language.cp

    @property
    def pipeline(self) -> dist.ProcessGroup:
        """Pipeline group."""
        return self.language.pp

    @property
    def data(self) -> dist.ProcessGroup:
        """Data-parallel group, without context parallelism."""
        return self.language.dp

    @property
    def data_context(self) -> dist.ProcessGroup:
        """Ranks that hold the same weights and see different tokens."""
        return self.language.dp_cp


_self_groups: list[dist.ProcessGroup] = []


def join_world(timeout_s: int) -> None:
    """Join the job that torchrun describes in the environment; alone when there is none."""
    if dist.is_initialized():
        return
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "nccl"  # the CPU platform reads this as gloo
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def initialize(parallel: ParallelConfig) -> Groups:
    """Make the groups of a layout. Every rank of the world calls this with the same layout.

    Raises:
        RuntimeError: from Megatron-Core, when the world does not divide (validated earlier for users).
    """
    virtual = parallel.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
    )
    language = ProcessGroupCollection.use_mpu_process_groups()
    for rank in range(dist.get_world_size()):
        group = dist.new_group([rank])
        if rank == dist.get_rank():
            _self_groups.append(group)
    self_only = _self_groups[-1]
    vision = ProcessGroupCollection.use_mpu_process_groups()
    vision.pp = vision.cp = self_only
    if parallel.vision_tensor_model_parallel_size == 1:
        vision.tp = self_only
    return Groups(language=language, vision=vision, self_only=self_only)


def destroy() -> None:
    """Forget the layout, so that another one can be made in the same processes (tests)."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    _self_groups.clear()
