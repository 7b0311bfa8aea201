"""What of Transformer Engine has an implementation here, by its name."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megavlm.platform.adam import FusedAdam as PlainAdam
from tests.stand_ins.calls import contracted
from tests.stand_ins.te_attention import DotProductAttention
from tests.stand_ins.te_modules import GroupedLinear, LayerNorm, LayerNormLinear, Linear, RMSNorm


class FP8GlobalStateManager:
    """FP8 is off."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        """Never."""
        return False

    @staticmethod
    def get_fp8_recipe() -> None:
        """None."""


@contextlib.contextmanager
@contracted("fp8_autocast")
def fp8_autocast(enabled: bool) -> Iterator[None]:
    """FP8 stays off."""
    assert not enabled
    yield


class activation_recompute_forward(contextlib.nullcontext[None]):  # noqa: N801
    """Recompute's phases matter to FP8 only."""

    @contracted("activation_recompute_forward.__init__")
    def __init__(self, activation_recompute: bool, recompute_phase: bool) -> None:
        assert activation_recompute or not recompute_phase
        super().__init__()


@contracted(
    "get_cpu_offload_context",
    "num_layers",
    "model_layers",
    "offload_activations",
    "offload_weights",
    "double_buffering",
)
def get_cpu_offload_context(
    enabled: bool,
) -> tuple[contextlib.AbstractContextManager[None], Callable[[torch.Tensor], torch.Tensor]]:
    """Nothing is offloaded."""
    assert not enabled
    return contextlib.nullcontext(), lambda tensor: tensor


@contracted("initialize_ub", "bootstrap_backend", "use_fp8")
def initialize_ub(shape: list[int], tp_size: int, dtype: Any, ub_cfgs: Any) -> None:
    """Buffers for messages: nothing travels through them here."""
    num_tokens, hidden_size = shape
    assert isinstance(dtype, torch.dtype)
    assert num_tokens % tp_size == 0 and hidden_size > 0 and ub_cfgs == {}


@contracted("general_gemm", "use_split_accumulator", "grad", "bulk_overlap")
def general_gemm(
    A: torch.Tensor,  # noqa: N803
    B: torch.Tensor,  # noqa: N803
    out_dtype: torch.dtype | None,
    gelu: bool | None,
    layout: str,
    out: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, None, None, None]:
    """A matrix product in the layouts of a linear's output (TN), gradient of its input (NN) and of its weight (NT)."""
    assert not gelu and out is None
    A, B = (tensor.to(out_dtype or A.dtype) for tensor in (A, B))
    product = {"TN": lambda: B @ A.t(), "NN": lambda: B @ A, "NT": lambda: B.t() @ A}[layout]()
    return product if bias is None else product + bias, None, None, None


class FusedAdam(PlainAdam):
    """`te.pytorch.optimizers.FusedAdam`."""

    @contracted("FusedAdam.__init__")
    def __init__(
        self,
        params: Any,
        lr: float,
        bias_correction: bool,
        betas: tuple[float, float],
        eps: float,
        adam_w_mode: bool,
        weight_decay: float,
    ) -> None:
        super().__init__(params, lr, bias_correction, betas, eps, adam_w_mode, weight_decay)


class MultiTensorApply:
    """`te.pytorch.optimizers.MultiTensorApply`."""

    @contracted("MultiTensorApply.__call__")
    def __call__(self, op: Any, noop_flag_buffer: torch.Tensor | None, tensor_lists: Any, args: tuple[Any, ...]) -> Any:
        """Run an operation on lists of tensors."""
        return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)


def multi_tensor_l2norm(
    _chunk_size: int, _noop: torch.Tensor | None, tensor_lists: list[list[torch.Tensor]], per_parameter: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Norm of all tensors together."""
    assert not per_parameter
    squares = [tensor.float().square().sum() for tensor in tensor_lists[0]]
    return torch.stack(squares).sum().sqrt()[None], None


def multi_tensor_scale(
    _chunk_size: int, _noop: torch.Tensor | None, tensor_lists: list[list[torch.Tensor]], scale: float
) -> None:
    """Second list = first list * scale."""
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)


IMPLEMENTED: dict[str, Any] = {
    "DotProductAttention": DotProductAttention,
    "FP8GlobalStateManager": FP8GlobalStateManager,
    "FusedAdam": FusedAdam,
    "GroupedLinear": GroupedLinear,
    "LayerNorm": LayerNorm,
    "LayerNormLinear": LayerNormLinear,
    "Linear": Linear,
    "RMSNorm": RMSNorm,
    "activation_recompute_forward": activation_recompute_forward,
    "fp8_autocast": fp8_autocast,
    "general_gemm": general_gemm,
    "get_cpu_offload_context": get_cpu_offload_context,
    "initialize_ub": initialize_ub,
    "multi_tensor_applier": MultiTensorApply(),
    "multi_tensor_l2norm": multi_tensor_l2norm,
    "multi_tensor_scale": multi_tensor_scale,
}
