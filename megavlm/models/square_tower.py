"""Vision towers that take images (or tiles) of one size: CLIP, SigLIP, InternViT.

Shape suffixes: P patches, C patch values, D tower hidden size, N images, F frames (tiles) of all images, 3 (frames,
rows, columns).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megavlm.models.architecture import VisionArchitecture
from megavlm.models.norm import AllHeadsNorm, mark_sequence_parallel, plain_layer_norm
from megavlm.models.vision import pack_params, run_layers, tower_block

Branch = tuple[torch.Tensor, torch.Tensor | None]


class ScaledResidual(nn.Module):
    """LayerScale: residual + scale * (branch + bias), in the place of Megatron-Core's bias-dropout-add.

    Source: Touvron et al., arXiv 2103.17239, section 3.
    """

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size, dtype=dtype))
        mark_sequence_parallel(self, False)

    def forward(self, _training: bool, _fused: bool) -> Callable[[Branch, torch.Tensor, float], torch.Tensor]:
        """Return what joins a branch, its bias not yet added, with the residual."""

        def join(branch: Branch, residual: torch.Tensor, _dropout: float) -> torch.Tensor:
            output, bias = branch
            return residual + self.scale * (output if bias is None else output + bias)

        return join


class SquareTower(MegatronModule):
    """Patches to the hidden state of the feature layer, the class token dropped, [P, D]; or a stage of that.

    Layers behind the feature, and a norm there, are never computed. Their weights are kept, frozen, so that an exported
    checkpoint is complete.
    """

    def __init__(
        self,
        config: TransformerConfig,
        architecture: VisionArchitecture,
        provider: LocalSpecProvider,
        groups: ProcessGroupCollection,
        unused: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Build this rank's stage.

        Args:
            config: of the encoder.
            architecture: what it is made of.
            provider: where modules come from.
            groups: of the encoder.
            unused: shapes of the tensors that are carried along, by their names with `.` as `__`.
        """
        super().__init__(config=config)
        size, dtype = architecture.hidden_size, config.params_dtype
        self.num_patches, self.num_extra = architecture.num_positions, int(architecture.class_token)
        self.is_first_stage = groups.pp.rank() == 0
        self.is_last_stage = groups.pp.rank() == groups.pp.size() - 1
        if self.is_first_stage:
            self.patch_embed = nn.Linear(architecture.patch_channels, size, bias=architecture.patch_bias, dtype=dtype)
            self.class_embedding = nn.Parameter(torch.zeros(size, dtype=dtype)) if architecture.class_token else None
            self.position_table = nn.Embedding(self.num_patches + self.num_extra, size, dtype=dtype)
            self.pre_norm = plain_layer_norm(size, architecture.norm_epsilon, dtype) if architecture.pre_norm else None
        join = ModuleSpec(module=ScaledResidual, params={"size": size, "dtype": dtype})
        heads_norm = ModuleSpec(
            module=AllHeadsNorm,
            params={"size": size, "epsilon": architecture.qk_norm_epsilon, "tp_group": groups.tp},
        )
        self.block = tower_block(
            config,
            provider,
            groups,
            join if architecture.layer_scale else None,
            heads_norm if architecture.qk_norm_epsilon is not None else None,
        )
        shapes = unused if self.is_last_stage else {}
        self.unused = nn.ParameterDict(
            {key: nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False) for key, shape in shapes.items()}
        )

    def forward(self, hiddens: list[torch.Tensor], grid_thw_N3: torch.Tensor) -> list[torch.Tensor]:
        """Encode; attention stays inside each frame.

        Args:
            hiddens: the patches [P, C], row by row, on the first stage; the hidden state [F * (patches + class token),
                D] elsewhere.
            grid_thw_N3: patch grid of every image.
        """
        num_frames, length = int(grid_thw_N3[:, 0].sum()), self.num_patches + self.num_extra
        (hidden,) = hiddens
        if self.is_first_stage:
            hidden = self._embed(hidden, num_frames)
        packing = pack_params([length] * num_frames, hidden.device)
        last, _ = run_layers(self.block, hidden[:, None], [packing] * len(self.block.layers), None, ())
        if not self.is_last_stage or not self.num_extra:
            return [last[:, 0]]
        without_class = last.view(num_frames, length, -1)[:, self.num_extra :]
        return [without_class.reshape(num_frames * self.num_patches, -1)]

    def _embed(self, patches_PC: torch.Tensor, num_frames: int) -> torch.Tensor:
        embedded: Any = self.patch_embed(patches_PC.to(self.patch_embed.weight.dtype))
        embedded = embedded.view(num_frames, self.num_patches, -1)
        if self.class_embedding is not None:
            embedded = torch.cat((self.class_embedding.expand(num_frames, 1, -1), embedded), dim=1)
        hidden: torch.Tensor = embedded + self.position_table.weight
        if self.pre_norm is not None:
            hidden = self.pre_norm(hidden)
        return hidden.flatten(0, 1)
