"""Normalisation in plain torch that works under sequence parallelism."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


class Norm:
    """RMSNorm or LayerNorm as the config says, its parameters marked for sequence parallelism.

    Megatron-Core's WrappedTorchNorm refuses sequence parallelism. All that it takes is the mark: finalize_model_grads
    then sums the gradients of the norm, which each tensor-parallel rank has seen a part of the sequence of.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_kwargs: Any
    ) -> nn.Module:
        """Build the norm; returns an nn.RMSNorm or nn.LayerNorm."""
        kinds: dict[str, type[nn.Module]] = {"RMSNorm": nn.RMSNorm, "LayerNorm": nn.LayerNorm}
        module = kinds[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        mark_sequence_parallel(module, config.sequence_parallel)
        return module


def mark_sequence_parallel(module: nn.Module, value: bool) -> None:
    """Say whether the module's parameters see only a part of the sequence on each tensor-parallel rank."""
    for parameter in module.parameters():
        vars(parameter)["sequence_parallel"] = value


def plain_rms_norm(size: int, epsilon: float, dtype: torch.dtype) -> nn.RMSNorm:
    """An RMSNorm that every tensor-parallel rank applies to the same whole input."""
    module = nn.RMSNorm(size, eps=epsilon, dtype=dtype)
    mark_sequence_parallel(module, False)
    return module


def plain_layer_norm(size: int, epsilon: float, dtype: torch.dtype) -> nn.LayerNorm:
    """A LayerNorm that every tensor-parallel rank applies to the same whole input (connectors, towers)."""
    module = nn.LayerNorm(size, eps=epsilon, dtype=dtype)
    mark_sequence_parallel(module, False)
    return module
