"""Norms and linears: parameters, their names and marks, and collectives are those of the real modules.

Parameters begin as NaN: one that no checkpoint fills is noticed.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tests.stand_ins.calls import contracted
from tests.stand_ins.te_collectives import Copy, Gather, ScatterSum, Sum

Group = dist.ProcessGroup | None
# `fuse_wgrad_accumulation` writes into `main_grad` instead of returning a gradient: not known here, so it must be off.
_HOW_IT_BEGINS = ("get_rng_state_tracker", "rng_tracker_name", "init_method", "device", "ub_name")
_HOW_IT_TRAVELS = ("ub_bulk_wgrad", "ub_bulk_dgrad", "ub_overlap_ag", "ub_overlap_rs", "ub_overlap_rs_dgrad")


def _mark(parameter: nn.Parameter, dimension: int) -> None:
    vars(parameter).update(tensor_model_parallel=True, partition_dim=dimension, partition_stride=1)


def _unset(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, torch.nan, dtype=dtype))


class _Stateful(nn.Module):
    """With an extra state, empty without FP8, as every module of Transformer Engine has."""

    def get_extra_state(self) -> torch.Tensor:
        """Nothing: FP8 is off."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Take nothing back."""
        assert state is None or not len(state)


class LayerNorm(nn.Module):
    """`te.pytorch.LayerNorm`."""

    @contracted("LayerNorm.__init__", "device")
    def __init__(
        self,
        normalized_shape: int | None,
        hidden_size: int | None,
        eps: float,
        sequence_parallel: bool | None,
        params_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        size = normalized_shape or hidden_size
        assert size is not None
        self.eps = eps
        self.weight, self.bias = _unset(size, dtype=params_dtype), _unset(size, dtype=params_dtype)
        for parameter in (self.weight, self.bias) if sequence_parallel is not None else ():
            vars(parameter)["sequence_parallel"] = sequence_parallel

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        """Normalise."""
        return F.layer_norm(inp, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """`te.pytorch.RMSNorm`."""

    @contracted("RMSNorm.__init__", "device")
    def __init__(
        self,
        normalized_shape: int | None,
        hidden_size: int | None,
        eps: float,
        sequence_parallel: bool | None,
        params_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        size = normalized_shape or hidden_size
        assert size is not None
        self.eps = eps
        self.weight = _unset(size, dtype=params_dtype)
        if sequence_parallel is not None:
            vars(self.weight)["sequence_parallel"] = sequence_parallel

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        """Normalise."""
        return F.rms_norm(inp, self.weight.shape, self.weight, self.eps)


class _TensorParallel(_Stateful):
    """What Linear and LayerNormLinear share."""

    def _build(
        self,
        sizes: tuple[int, int],
        sequence_parallel: bool,
        tp: tuple[Group, int],
        bias: bool,
        return_bias: bool,
        dtype: torch.dtype,
        parallel_mode: str | None,
    ) -> None:
        self.in_features, self.out_features = sizes
        self.tp_group, self.tp_size = tp if tp[0] is None else (tp[0], tp[0].size())
        assert self.tp_size == 1 or self.tp_group is not None
        self.use_bias, self.return_bias, self.parallel_mode = bias, return_bias, parallel_mode
        if parallel_mode == "column":
            assert self.out_features % self.tp_size == 0
            self.out_features //= self.tp_size
        elif parallel_mode == "row":
            assert self.in_features % self.tp_size == 0
            self.in_features //= self.tp_size
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.weight = _unset(self.out_features, self.in_features, dtype=dtype)
        _mark(self.weight, 1 if parallel_mode == "row" else 0)
        if not bias:
            self.bias = torch.empty(0, dtype=dtype)
            return
        self.bias = _unset(self.out_features, dtype=dtype)
        if parallel_mode == "row":
            vars(self.bias)["sequence_parallel"] = self.sequence_parallel
        elif parallel_mode == "column":
            _mark(self.bias, 0)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        if not self.use_bias:
            self.bias = fn(self.bias)
        return super()._apply(fn, recurse)

    def _linear(self, inp: torch.Tensor) -> Any:
        spread = self.tp_size > 1 and self.parallel_mode is not None
        if spread and self.parallel_mode == "column":
            inp = (Gather if self.sequence_parallel else Copy).apply(inp, self.tp_group)
        added = self.bias if self.use_bias and not self.return_bias else None
        if self.parallel_mode != "row":
            out = F.linear(inp, self.weight, added)
        else:
            out = F.linear(inp, self.weight)
            if spread:
                out = (ScatterSum if self.sequence_parallel else Sum).apply(out, self.tp_group)
            out = out if added is None else out + added
        return (out, self.bias) if self.return_bias else out


class Linear(_TensorParallel):
    """`te.pytorch.Linear`."""

    @contracted("Linear.__init__", *_HOW_IT_BEGINS, *_HOW_IT_TRAVELS)
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool,
        tp_group: Group,
        tp_size: int,
        bias: bool,
        return_bias: bool,
        params_dtype: torch.dtype,
        parallel_mode: str | None,
    ) -> None:
        super().__init__()
        sizes, tp = (in_features, out_features), (tp_group, tp_size)
        self._build(sizes, sequence_parallel, tp, bias, return_bias, params_dtype, parallel_mode)

    @contracted("Linear.forward", "is_first_microbatch")
    def forward(self, inp: torch.Tensor) -> Any:
        """Output, with the bias that is still to be added if `return_bias`."""
        return self._linear(inp)


class LayerNormLinear(_TensorParallel):
    """`te.pytorch.LayerNormLinear`."""

    @contracted("LayerNormLinear.__init__", *_HOW_IT_BEGINS, *_HOW_IT_TRAVELS)
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float,
        sequence_parallel: bool,
        tp_group: Group,
        tp_size: int,
        bias: bool,
        normalization: str,
        return_bias: bool,
        params_dtype: torch.dtype,
        parallel_mode: str | None,
        return_layernorm_output: bool,
    ) -> None:
        super().__init__()
        sizes, tp = (in_features, out_features), (tp_group, tp_size)
        self._build(sizes, sequence_parallel, tp, bias, return_bias, params_dtype, parallel_mode)
        self.return_layernorm_output = return_layernorm_output
        self.eps, self.normalization = eps, normalization
        self.layer_norm_weight = _unset(in_features, dtype=params_dtype)
        vars(self.layer_norm_weight)["sequence_parallel"] = self.sequence_parallel
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = _unset(in_features, dtype=params_dtype)
            vars(self.layer_norm_bias)["sequence_parallel"] = self.sequence_parallel

    @contracted("LayerNormLinear.forward", "is_first_microbatch")
    def forward(self, inp: torch.Tensor) -> Any:
        """Normalise, then as Linear; `return_layernorm_output` puts this rank's normalised tokens behind the rest."""
        shape = self.layer_norm_weight.shape
        if self.normalization == "RMSNorm":
            normed = F.rms_norm(inp, shape, self.layer_norm_weight, self.eps)
        else:
            normed = F.layer_norm(inp, shape, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        given = self._linear(normed)
        if not self.return_layernorm_output:
            return given
        return (*given, normed) if self.return_bias else (given, normed)


class GroupedLinear(_Stateful):
    """`te.pytorch.GroupedLinear`: no collectives, whatever the parallel mode."""

    @contracted("GroupedLinear.__init__", *_HOW_IT_BEGINS, "sequence_parallel")
    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        tp_group: Group,
        tp_size: int,
        bias: bool,
        return_bias: bool,
        params_dtype: torch.dtype,
        parallel_mode: str | None,
    ) -> None:
        super().__init__()
        self.num_gemms, self.use_bias, self.return_bias = num_gemms, bias, return_bias
        assert not bias, "no mixture here has biases"
        size = tp_size if tp_group is None else tp_group.size()
        if parallel_mode == "column":
            out_features //= size
        elif parallel_mode == "row":
            in_features //= size
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}
        self.fp8 = self.fp8_calibration = False
        for number in range(num_gemms):
            weight = _unset(out_features, in_features, dtype=params_dtype)
            self.register_parameter(f"weight{number}", weight)
            _mark(weight, 1 if parallel_mode == "row" else 0)

    def init_fp8_metadata(self, num_gemms: int) -> None:
        """Nothing: FP8 is off."""
        assert num_gemms == self.num_gemms

    @contracted("GroupedLinear.forward", "is_first_microbatch")
    def forward(self, inp: torch.Tensor, m_splits: list[int]) -> torch.Tensor:
        """Rows of each expert through its matrix."""
        assert len(m_splits) == self.num_gemms and all(isinstance(size, int) for size in m_splits)
        parts = inp.split(m_splits)
        weights = [self.get_parameter(f"weight{number}") for number in range(self.num_gemms)]
        return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weights, strict=True)])
