"""Modules of the `te` backend: Transformer Engine's, in Megatron-Core's wrappers.

Imported only where Transformer Engine is.
"""

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_te_version, is_te_min_version
from torch import nn

from megavlm.errors import use_error
from megavlm.models import kernels
from megavlm.models.core_attention import PackedAttention
from megavlm.models.linear import AdaptableLinear, Output, with_adapter

# The first version whose all-gather takes packed rows under context parallelism; those before it refuse them.
PACKED_ALL_GATHER_FROM = "2.18.0"


class TEColumnLinear(TEColumnParallelLinear, AdaptableLinear):
    """Column-parallel linear with a place for an adapter."""

    is_column = True

    def __init__(self, input_size: int, output_size: int, **options: Any) -> None:
        super().__init__(input_size, output_size, **options)
        _make_adaptable(self, input_size, output_size)

    @property
    def own_bias(self) -> torch.Tensor | None:
        """The bias that is in the output already."""
        return _own_bias(self)

    def forward(self, x: torch.Tensor) -> Output:
        """Output, and the bias that is still to be added."""
        if self.adapter is None or not self.adapter.enabled:
            return self.run(x)
        output: Output = self.adapter(self, x)
        return output

    def run(self, x: torch.Tensor) -> Output:
        """The same without the adapter."""
        output: Output = super().forward(x)
        return output

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Sharded weights, the adapter's by its own word."""
        own = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return with_adapter(own, self.adapter, prefix, sharded_offsets, metadata)


class TENormColumnLinear(TELayerNormColumnParallelLinear, AdaptableLinear):
    """Norm and column-parallel linear in one, with a place for an adapter behind the norm.

    An adapter takes what the norm gives: with `return_layernorm_output` Transformer Engine gives it beside the output,
    under sequence parallelism this rank's tokens of it. Megatron-Core's wrapper always says False to that, so it is
    said to the module, which reads its attribute in each forward pass (2.11 and 2.20, module/layernorm_linear.py).
    """

    is_column = True

    def __init__(self, input_size: int, output_size: int, **options: Any) -> None:
        super().__init__(input_size, output_size, **options)
        assert "return_layernorm_output" in vars(self), "Transformer Engine's LayerNormLinear is another one"
        _make_adaptable(self, input_size, output_size)

    @property
    def own_bias(self) -> torch.Tensor | None:
        """The bias that is in the output already."""
        return _own_bias(self)

    def forward(self, x: torch.Tensor) -> Output:
        """Output, and the bias that is still to be added."""
        if self.adapter is None or not self.adapter.enabled:
            return self.run(x)
        output: Output = self.adapter(self, x)
        return output

    def run(self, x: torch.Tensor) -> Output:
        """The same without the adapter."""
        output: Output = super().forward(x)
        return output

    def run_and_take(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """The same, and the norm's output."""
        self.return_layernorm_output = True
        try:
            given = super().forward(x)
        finally:
            self.return_layernorm_output = False
        if self.te_return_bias:
            output, bias, normed = given
            return output, bias, normed
        (output, normed), _ = given
        return output, None, normed

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Sharded weights, the adapter's by its own word."""
        own = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return with_adapter(own, self.adapter, prefix, sharded_offsets, metadata)


class TERowLinear(TERowParallelLinear, AdaptableLinear):
    """Row-parallel linear with a place for an adapter, which hands out a copy of its bias; see `RowLinear` for why."""

    is_column = False

    def __init__(self, input_size: int, output_size: int, **options: Any) -> None:
        super().__init__(input_size, output_size, **options)
        _make_adaptable(self, input_size, output_size)

    @property
    def own_bias(self) -> torch.Tensor | None:
        """The bias that is in the output already."""
        return _own_bias(self)

    def forward(self, x: torch.Tensor) -> Output:
        """Output, and the bias that is still to be added."""
        if self.adapter is None or not self.adapter.enabled:
            return self.run(x)
        output: Output = self.adapter(self, x)
        return output

    def run(self, x: torch.Tensor) -> Output:
        """The same without the adapter."""
        output, bias = super().forward(x)
        return output, None if bias is None else bias.clone()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Sharded weights, the adapter's by its own word."""
        own = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return with_adapter(own, self.adapter, prefix, sharded_offsets, metadata)


def _make_adaptable(
    linear: TEColumnLinear | TENormColumnLinear | TERowLinear, input_size: int, output_size: int
) -> None:
    """Give it the place, and the sizes by their common names."""
    linear.register_module("adapter", None)
    linear.store = None
    linear.input_size, linear.output_size = input_size, output_size
    linear.output_size_per_partition, linear.input_size_per_partition = linear.weight.shape


def _own_bias(linear: TEColumnLinear | TENormColumnLinear | TERowLinear) -> torch.Tensor | None:
    bias: torch.Tensor | None = linear.bias if linear.use_bias and not linear.te_return_bias else None
    return bias


class TEAttention:
    """Transformer Engine's attention, or torch's where its kernels refuse (`kernels.py`)."""

    def __new__(  # type: ignore[misc]
        cls,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        """Build the module.

        Raises:
            UseError: context parallelism in a way that neither of the two knows.
        """
        fused = kernels.takes(config, "te", attn_mask_type)
        if config.context_parallel_size > 1:
            _check_context(config, cp_comm_type or "p2p", fused)
        module: nn.Module = (TEDotProductAttention if fused else PackedAttention)(
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type=attention_type,
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
            **kwargs,
        )
        return module


def _check_context(config: TransformerConfig, kind: str, fused: bool) -> None:
    where = "parallel.cp_comm_type"
    if not fused and kind == "a2a":
        raise use_error(
            where,
            f"a2a, and {kernels.refusal(config)}",
            "p2p or all_gather, where torch computes attention",
            f"set {where}=p2p",
        )
    if fused and kind == "all_gather" and not is_te_min_version(PACKED_ALL_GATHER_FROM):
        raise use_error(
            where,
            f"all_gather with Transformer Engine {get_te_version()}",
            f"p2p or a2a before version {PACKED_ALL_GATHER_FROM}, as rows are packed",
            f"set {where}=p2p",
        )
    if kind == "a2a":
        size = config.context_parallel_size * config.tensor_model_parallel_size
        for name, number in (("heads", config.num_attention_heads), ("key/value groups", config.num_query_groups)):
            if number % size:
                raise use_error(
                    where,
                    f"a2a with {number} {name}",
                    f"a multiple of {size} (context parallel size x tensor parallel size)",
                    f"set {where}=p2p",
                )


class TEProvider(LocalSpecProvider):
    """Transformer Engine's modules: norms fused with the linear behind them, attention, grouped experts."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, **_options: Any) -> type:
        """Return the norm module."""
        return TENorm

    def column_parallel_linear(self) -> type:
        """Return the linear split over its outputs."""
        return TEColumnLinear

    def row_parallel_linear(self) -> type:
        """Return the linear split over its inputs."""
        return TERowLinear

    def fuse_layernorm_and_linear(self) -> bool:
        """Norm and linear are one module."""
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        """Return norm and linear in one."""
        return TENormColumnLinear

    def core_attention(self) -> type:
        """Return the core attention module."""
        return TEAttention

    def experts(self) -> ModuleSpec:
        """All experts of a rank in one grouped matrix product."""
        linears = MLPSubmodules(linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear)
        return ModuleSpec(module=TEGroupedMLP, submodules=linears)
