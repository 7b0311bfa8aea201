"""Connectors between a vision tower and a language model.

Shape suffixes: P patches, D tower hidden size, V visual tokens, K slots (1 + DeepStack features), H language hidden
size.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megavlm.models.activations import ACTIVATIONS
from megavlm.models.norm import plain_layer_norm, plain_rms_norm


class TwoLayerMLP(MegatronModule):
    """Linear, activation, Linear, with biases; tensor parallel over the middle.

    `norm_size` of 0 leaves the input as it is. With `merge > 1`, that many neighbouring patches become one input;
    the norm comes before the merge when norm_size is the tower's hidden size, after it when it is the merged one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        provider: BackendSpecProvider,
        groups: ProcessGroupCollection,
        sizes: tuple[int, int, int],
        activation: Callable[[torch.Tensor], torch.Tensor],
        merge: int = 1,
        norm_size: int = 0,
        norm_epsilon: float = 1e-6,
        rms_norm: bool = False,
    ) -> None:
        super().__init__(config=config)
        self.input_size, hidden_size, output_size = sizes
        self.activation, self.merge = activation, merge
        make_norm = plain_rms_norm if rms_norm else plain_layer_norm
        self.norm = make_norm(norm_size, norm_epsilon, config.params_dtype) if norm_size else None
        self.norm_after_merge = norm_size == self.input_size and merge > 1
        linear = {"config": config, "bias": True, "tp_group": groups.tp, "skip_bias_add": False, "is_expert": False}
        self.linear_fc1 = provider.column_parallel_linear()(
            self.input_size, hidden_size, init_method=config.init_method, gather_output=False, **linear
        )
        self.linear_fc2 = provider.row_parallel_linear()(
            hidden_size,
            output_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            **linear,
        )

    def forward(self, hidden_PD: torch.Tensor) -> torch.Tensor:
        """[P, D] to [V, H]."""
        if self.norm is not None and not self.norm_after_merge:
            hidden_PD = self.norm(hidden_PD)
        merged = hidden_PD.reshape(-1, self.input_size)
        if self.norm is not None and self.norm_after_merge:
            merged = self.norm(merged)
        middle, _ = self.linear_fc1(merged[:, None])
        output, _ = self.linear_fc2(self.activation(middle))
        return output[:, 0]


class PixelShuffleMLP(MegatronModule):
    """Neighbouring patches of a square image become one input of LayerNorm, Linear, GELU, Linear (InternVL)."""

    def __init__(
        self,
        config: TransformerConfig,
        provider: BackendSpecProvider,
        groups: ProcessGroupCollection,
        sizes: tuple[int, int],
        side: int,
        merge: int,
        norm_epsilon: float,
    ) -> None:
        """Build it.

        Args:
            config: of the encoder.
            provider: where modules come from.
            groups: of the encoder.
            sizes: hidden sizes of tower and language model.
            side: patches of an image along each side.
            merge: of these, how many become one.
            norm_epsilon: of the norm.
        """
        super().__init__(config=config)
        tower_size, size = sizes
        merged = tower_size * merge**2
        self.num_patches = side**2
        raster = torch.arange(self.num_patches).reshape(side // merge, merge, side // merge, merge)
        # where each patch of merge-block order stands row by row; no part of the state
        self.order = raster.transpose(1, 2).flatten()
        gelu = ACTIVATIONS["gelu"]
        self.mlp = TwoLayerMLP(
            config, provider, groups, (merged, size, size), gelu, merge**2, norm_size=merged, norm_epsilon=norm_epsilon
        )

    def forward(self, hidden_PD: torch.Tensor) -> torch.Tensor:
        """[P, D] to [V, H]."""
        blocks = hidden_PD.unflatten(0, (-1, self.num_patches))[:, self.order.to(hidden_PD.device)]
        output: torch.Tensor = self.mlp(blocks.flatten(0, 1))
        return output


class Connectors(MegatronModule):
    """One connector per tapped hidden state of the tower: the embedding's first, then DeepStack's."""

    def __init__(self, config: TransformerConfig, main: nn.Module, deepstack: list[nn.Module]) -> None:
        super().__init__(config=config)
        self.main = main
        self.deepstack = nn.ModuleList(deepstack)

    def forward(self, hiddens_PD: list[torch.Tensor], _grid_thw_N3: torch.Tensor) -> torch.Tensor:
        """Hidden states of the tower (last, then taps) to features [V, K, H]; patch by patch, whatever the grids."""
        modules = [self.main, *self.deepstack]
        return torch.stack([module(hidden) for module, hidden in zip(modules, hiddens_PD, strict=True)], dim=1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Sharded weights; Megatron-Core would take a ModuleList's parameters for replicated ones."""
        parts: dict[str, Any] = {f"{prefix}main.": self.main}
        parts |= {f"{prefix}deepstack.{number}.": module for number, module in enumerate(self.deepstack)}
        state: dict[str, Any] = {}
        for name, module in parts.items():
            state |= module.sharded_state_dict(name, sharded_offsets, metadata)
        return state
