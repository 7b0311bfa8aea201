"""Transformer layer specs, from one provider of modules per backend.

`torch` runs everywhere; `flash` takes its attention from flash-attn; `te` takes everything from Transformer Engine.
Whatever the backend, weights have the same names in weight maps and checkpoints.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import nn

from megavlm.errors import use_error
from megavlm.models.core_attention import PackedAttention
from megavlm.models.linear import ColumnLinear, RowLinear
from megavlm.models.names import FUSED_NORMS
from megavlm.models.norm import Norm
from megavlm.platform.capabilities import require


class TorchProvider(LocalSpecProvider):
    """Megatron-Core's linears, with a norm in plain torch and a core attention of choice."""

    def __init__(self, attention: type = PackedAttention) -> None:
        self.attention = attention

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, **_options: Any) -> type:
        """Return the norm module."""
        return Norm

    def column_parallel_linear(self) -> type:
        """Return the linear split over its outputs."""
        return ColumnLinear

    def row_parallel_linear(self) -> type:
        """Return the linear split over its inputs."""
        return RowLinear

    def core_attention(self) -> type:
        """Return the core attention module."""
        return self.attention

    def experts(self) -> ModuleSpec:
        """One expert of a rank after the other."""
        linears = MLPSubmodules(linear_fc1=self.column_parallel_linear(), linear_fc2=self.row_parallel_linear())
        return ModuleSpec(module=SequentialMLP, submodules=linears)


def without_bias(linear: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A linear that has no bias, whatever it is asked for.

    Megatron-Core gives queries, keys and values biases wherever the other linears of a layer have some.
    """

    def build(*args: Any, **kwargs: Any) -> nn.Module:
        return linear(*args, **(kwargs | {"bias": False}))

    return build


def _torch_provider() -> LocalSpecProvider:
    return TorchProvider()


def _flash_provider() -> LocalSpecProvider:
    require("flash-attn")
    from megavlm.models.flash import FlashAttention

    return TorchProvider(FlashAttention)


def _te_provider() -> LocalSpecProvider:
    if not HAVE_TE:
        found = require("transformer-engine")
        raise use_error(
            "model.backend",
            f"te with Transformer Engine {found.version}, which this megatron-core does not take",
            "versions that fit together",
            f"{found.install}, or set model.backend=torch",
        )
    from megavlm.models.te import TEProvider

    return TEProvider()


PROVIDERS: dict[str, Callable[[], LocalSpecProvider]] = {
    "torch": _torch_provider,
    "flash": _flash_provider,
    "te": _te_provider,
}


def provider_of(backend: str) -> LocalSpecProvider:
    """Modules of a backend.

    Raises:
        UseError: a package is missing that the backend needs.
    """
    return PROVIDERS[backend]()


def layer_spec(
    provider: LocalSpecProvider,
    mask_type: AttnMaskType,
    qk_norm: bool = False,
    layer_class: type[TransformerLayer] = TransformerLayer,
    params: dict[str, Any] | None = None,
    mlp: ModuleSpec | None = None,
) -> ModuleSpec:
    """One pre-norm transformer layer.

    Args:
        provider: where the modules come from.
        mask_type: `causal` for language models, `no_mask` for vision towers.
        qk_norm: normalise each head's query and key before RoPE (Qwen3).
        layer_class: the layer module.
        params: further constructor arguments of the layer module.
        mlp: what stands in place of a dense MLP.
    """
    norm, column = provider.layer_norm(), provider.column_parallel_linear()
    fused = provider.column_parallel_layer_norm_linear()
    dense = MLPSubmodules(linear_fc1=fused or column, linear_fc2=provider.row_parallel_linear())
    return ModuleSpec(
        module=layer_class,
        params=params or {},
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fused else norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": mask_type},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=fused or column,
                    core_attention=provider.core_attention(),
                    linear_proj=provider.row_parallel_linear(),
                    q_layernorm=norm if qk_norm else IdentityOp,
                    k_layernorm=norm if qk_norm else IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if fused and mlp is None else norm,
            mlp=mlp or ModuleSpec(module=MLP, submodules=dense),
            mlp_bda=get_bias_dropout_add,
            # checkpoints have the norm's own name
            sharded_state_dict_keys_map=dict(FUSED_NORMS) if fused else {},
        ),
    )
