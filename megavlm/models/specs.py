"""Transformer layer specs, from one provider of modules per backend.

`torch` runs everywhere. `te` (Transformer Engine) and `flash` get their providers here.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import nn

from megavlm.errors import use_error
from megavlm.models.core_attention import PackedAttention
from megavlm.models.linear import ColumnLinear, RowLinear
from megavlm.models.norm import Norm


class TorchProvider(LocalSpecProvider):
    """Megatron-Core's linears, with a norm and a core attention in plain torch."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
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
        return PackedAttention


def without_bias(linear: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A linear that has no bias, whatever it is asked for.

    Megatron-Core gives queries, keys and values biases wherever the other linears of a layer have some.
    """

    def build(*args: Any, **kwargs: Any) -> nn.Module:
        return linear(*args, **(kwargs | {"bias": False}))

    return build


PROVIDERS: dict[str, type[LocalSpecProvider]] = {"torch": TorchProvider}


def provider_of(backend: str) -> LocalSpecProvider:
    """Modules of a backend.

    Raises:
        UseError: the backend has no provider in this version.
    """
    if backend not in PROVIDERS:
        raise use_error("model.backend", backend, f"one of {', '.join(PROVIDERS)}", "set model.backend=torch")
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
    norm = provider.layer_norm()
    dense = MLPSubmodules(linear_fc1=provider.column_parallel_linear(), linear_fc2=provider.row_parallel_linear())
    return ModuleSpec(
        module=layer_class,
        params=params or {},
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": mask_type},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=provider.column_parallel_linear(),
                    core_attention=provider.core_attention(),
                    linear_proj=provider.row_parallel_linear(),
                    q_layernorm=norm if qk_norm else IdentityOp,
                    k_layernorm=norm if qk_norm else IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp or ModuleSpec(module=MLP, submodules=dense),
            mlp_bda=get_bias_dropout_add,
        ),
    )
