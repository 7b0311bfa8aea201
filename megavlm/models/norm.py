"""Normalisation in plain torch that works under sequence and tensor parallelism.

Shape suffixes: T tokens, N heads of this rank, C channels of a head.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from megavlm.platform.cpu_kernels import rms_norm


class RMSNorm(nn.RMSNorm):
    """torch's, with a kernel for CPUs: torch has one for GPUs only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension of a tensor of any floating type."""
        if not x.is_cpu:
            return super().forward(x)
        assert self.eps is not None and len(self.normalized_shape) == 1
        return rms_norm(x, self.weight, self.eps)


class Norm:
    """RMSNorm or LayerNorm as the config says, its parameters marked for sequence parallelism.

    Megatron-Core's WrappedTorchNorm refuses sequence parallelism. All that it takes is the mark: finalize_model_grads
    then sums the gradients of the norm, which each tensor-parallel rank has seen a part of the sequence of.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_kwargs: Any
    ) -> nn.Module:
        """Build the norm; returns an RMSNorm or nn.LayerNorm."""
        kinds: dict[str, type[nn.Module]] = {"RMSNorm": RMSNorm, "LayerNorm": nn.LayerNorm}
        module = kinds[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        mark_sequence_parallel(module, config.sequence_parallel)
        return module


def mark_sequence_parallel(module: nn.Module, value: bool) -> None:
    """Say whether the module's parameters see only a part of the sequence on each tensor-parallel rank."""
    for parameter in module.parameters():
        vars(parameter)["sequence_parallel"] = value


def plain_rms_norm(size: int, epsilon: float, dtype: torch.dtype) -> RMSNorm:
    """An RMSNorm that every tensor-parallel rank applies to the same whole input."""
    module = RMSNorm(size, eps=epsilon, dtype=dtype)
    mark_sequence_parallel(module, False)
    return module


def plain_layer_norm(size: int, epsilon: float, dtype: torch.dtype) -> nn.LayerNorm:
    """A LayerNorm that every tensor-parallel rank applies to the same whole input (connectors, towers)."""
    module = nn.LayerNorm(size, eps=epsilon, dtype=dtype)
    mark_sequence_parallel(module, False)
    return module


class AllHeadsNorm(MegatronModule):
    """RMSNorm over all heads of a query (or key) together; each tensor-parallel rank has some of the heads.

    Takes the place of Megatron-Core's norm of each head in a layer spec. The weight is shared out as the heads are.

    Source: transformers' InternVLVisionRMSNorm (InternViT-6B, arXiv 2312.14238, section 3.2).
    """

    def __init__(
        self, config: TransformerConfig, size: int, epsilon: float, tp_group: dist.ProcessGroup, **_of_a_head: Any
    ) -> None:
        """Build this rank's part.

        Args:
            config: of the encoder.
            size: channels of all heads of all ranks.
            epsilon: added to the mean of squares.
            tp_group: ranks that share the heads.
            _of_a_head: what Megatron-Core hands to the norm of a head.
        """
        super().__init__(config=config)
        self.size, self.epsilon, self.tp_group = size, epsilon, tp_group
        self.weight = nn.Parameter(torch.ones(size // tp_group.size(), dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)
        mark_sequence_parallel(self, False)

    def forward(self, heads_T1NC: torch.Tensor) -> torch.Tensor:
        """Normalise [T, 1, N, C], in fp32 arithmetic."""
        rows = heads_T1NC.flatten(-2).float()
        squares = reduce_from_tensor_model_parallel_region(rows.pow(2).sum(-1, keepdim=True), self.tp_group)
        # Every rank's output depends on the sum, so that its gradient is a sum over ranks too.
        squares = copy_to_tensor_model_parallel_region(squares, self.tp_group)
        normalised = rows * torch.rsqrt(squares / self.size + self.epsilon)
        return (self.weight * normalised.to(heads_T1NC.dtype)).view(heads_T1NC.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """This rank's part of the weight, by where it lies in the whole."""
        assert metadata is not None
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return state
